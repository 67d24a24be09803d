'use strict'
// The page holds one array of bytes, deflated: the length of a JSON header, the header, then the arrays that it lists.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0))
  const buffer = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'))).arrayBuffer()
  const length = new DataView(buffer).getUint32(0, true), D = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)))
  let at = 4 + length
  for (const [name, width, n] of D.arrays) {
    D[name] = new {1: Uint8Array, 2: Uint16Array, 4: Uint32Array}[width](buffer.slice(at, at += width*n))
  }
  return D
}

// What is asked of the codes. These answer as the getters of the same names in Python do.
function getters(D) {
  const N = D.labels.length, kept = D.heads, starts = [0], rank = new Map(kept.map((h, k) => [h, k]))
  for (const n of D.lengths) starts.push(starts.at(-1) + n)
  const code = (k, e) => D.codes[k*N + e] - 1                              // of the k-th head of the page; -1: silent
  const name = h => `L${Math.floor(h/D.n_heads)}H${h % D.n_heads}`
  const byCount = (a, b) => b.positives - a.positives || a.negatives - b.negatives

  function codesOf(k) {
    const found = new Map()
    for (let e = 0; e < N; e++) {
      const c = code(k, e)
      if (!found.has(c)) found.set(c, {code: c, positives: 0, negatives: 0})
      found.get(c)[D.labels[e] ? 'positives' : 'negatives']++
    }
    for (const r of found.values()) r.unique = r.code >= 0 && r.positives > 0 && r.negatives === 0
    return [...found.values()].sort((a, b) => (a.code < 0) - (b.code < 0) || byCount(a, b) || a.code - b.code)
  }

  const tokensOf = e => Array.from(D.tokens.subarray(starts[e], starts[e + 1]), t => D.vocabulary[t])
  const rowsOf = (k, c) => Array.from(D.order.subarray(k*N, (k + 1)*N)).filter(e => code(k, e) === c)

  // Shares lie head by head, code by code, for the first prompts of each code alone.
  const places = []
  function placesOf(k) {
    let at = 0
    for (let j = 0; j <= k; j++) {
      if (places[j]) { at = places[j].end; continue }
      const place = new Map(), seen = new Map()
      for (const e of D.order.subarray(j*N, (j + 1)*N)) {
        const c = code(j, e), n = (seen.get(c) || 0) + 1
        seen.set(c, n)
        if (c < 0 || (D.prompts !== null && n > D.prompts)) continue
        place.set(e, at); at += D.lengths[e]
      }
      places[j] = {place, end: at}
    }
    return places[k].place
  }

  function promptsOf(k, c, n) {
    const rows = rowsOf(k, c), place = D.shares && c >= 0 ? placesOf(k) : new Map()
    return rows.slice(0, Math.min(n, D.prompts ?? n)).map(e => ({
      row: e, positive: !!D.labels[e], tokens: tokensOf(e),
      shares: place.has(e) ? Array.from(D.shares.subarray(place.get(e), place.get(e) + D.lengths[e]), s => s/255) : null}))
  }

  function switchWith(k, c, n) {
    const inside = new Uint8Array(N), out = []
    let n_in = 0
    for (const e of rowsOf(k, c)) { inside[e] = 1; n_in++ }
    for (let j = 0; j < kept.length; j++) {
      if (j === k) continue
      const counts = new Map()
      for (let e = 0; e < N; e++) if (inside[e]) counts.set(code(j, e), (counts.get(code(j, e)) || 0) + 1)
      const [mode, most] = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0])[0]
      let others = 0
      for (let e = 0; e < N; e++) others += !inside[e] && code(j, e) === mode
      const r = {k: j, head: kept[j], code: mode, inside: most/n_in, outside: others/Math.max(N - n_in, 1)}
      out.push({...r, difference: r.inside - r.outside})
    }
    return out.sort((a, b) => b.difference - a.difference || a.head - b.head).slice(0, n)
  }

  const ranked = D.scores.map((s, h) => h).sort((a, b) => D.scores[b] - D.scores[a] || a - b)
  const cuts = [...new Set(D.scores)].sort((a, b) => a - b)
  function at(threshold) {
    const heads = ranked.filter(h => D.scores[h] >= threshold), top = D.scores[ranked[0]]
    const part = D.over === 'sum' ? s => s : s => Math.exp(s - top) // of all: a share of the sum, or a softmax probability
    const share = Math.min(1, part(threshold)/D.scores.reduce((t, s) => t + part(s), 0))
    if (!D.truth) return {threshold, share, heads}
    const right = heads.filter(h => D.truth.includes(h)).length, n = D.truth.length
    return {threshold, share, heads, precision: heads.length ? right/heads.length : null, recall: right/Math.max(n, 1), fpr: (heads.length - right)/Math.max(D.scores.length - n, 1)}
  }

  function pairsOf(a, b) {
    const found = new Map()
    for (let e = 0; e < N; e++) {
      const x = code(a, e), y = code(b, e)
      if (x < 0 || y < 0) continue
      if (!found.has(`${x} ${y}`)) found.set(`${x} ${y}`, {a: x, b: y, positives: 0, negatives: 0})
      found.get(`${x} ${y}`)[D.labels[e] ? 'positives' : 'negatives']++
    }
    for (const r of found.values()) r.unique = r.positives > 0 && r.negatives === 0
    return [...found.values()].sort((p, q) => byCount(p, q) || p.a - q.a || p.b - q.b)
  }
  return {name, ranked, cuts, kept, rank, code, tokensOf, codesOf, rowsOf, promptsOf, switchWith, at, pairsOf}
}

// Drawing. Text goes in as text, never as markup.
const $ = id => document.getElementById(id)
function el(tag, attributes = {}, ...children) {
  const svg = ['svg', 'rect', 'line', 'polyline', 'circle', 'text', 'title'].includes(tag)
  const e = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
  for (const [k, v] of Object.entries(attributes)) { if (k === 'onclick') e.addEventListener('click', v); else if (v !== null) e.setAttribute(k, v) }
  e.append(...children.map(c => c instanceof Node ? c : String(c)))
  return e
}
const per = x => `${Math.round(100*x)} %`, said = c => c < 0 ? 'silent' : c, plural = (n, thing) => `${n} ${thing}${n === 1 ? '' : 's'}`
const figure = x => x === undefined || x === null ? '–' : x.toFixed(3)
const num = x => Number.isInteger(x) ? String(x) : x.toPrecision(4)

function view(D) {
  const G = getters(D), isTrue = h => D.truth && D.truth.includes(h), FIRST = 20
  let head = 0, chosen = null

  function tokensOf(p) {
    const most = p.shares ? Math.max(...p.shares) : 0, text = el('span', {class: 'text'})
    p.tokens.forEach((t, i) => {
      const shown = t.replaceAll('\n', '⏎\n'), s = most ? p.shares[i] : 0
      text.append(s ? el('span', {class: s === most ? 'token most' : 'token', style: `--share:${(s/most).toFixed(3)}`, 'data-share': s.toFixed(4), title: `${t.trim() || (t ? 'space' : '…')}: share ${per(s)}`}, shown)
                    : el('span', {title: p.shares ? 'share 0 %' : null}, shown))
    })
    if (!most) return text
    const best = p.shares.map((s, i) => [s, i]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, 3).filter(([s]) => s >= .05)
    return el('span', {}, text, el('span', {class: 'carried'}, best.map(([s, i]) => `${p.tokens[i].trim() || (p.tokens[i] ? 'space' : '…')} ${per(s)}`).join(' · ')))
  }

  const line = (e, text) => el('li', {'data-row': e}, el('span', {class: D.labels[e] ? 'label positive' : 'label'}, D.labels[e] ? 'positive' : 'negative'), text)

  function showPrompts(n = FIRST) {
    const rows = G.rowsOf(head, chosen), shown = G.promptsOf(head, chosen, n), all = Math.min(rows.length, D.prompts ?? rows.length)
    $('prompts-title').textContent = `Prompts of ${G.name(G.kept[head])}, ${chosen < 0 ? 'silent' : `code ${chosen}`}`
    const left = shown.length < rows.length ? `${shown.length} of ${plural(rows.length, 'prompt')}` : plural(rows.length, 'prompt')
    $('prompts-note').textContent = left + (chosen < 0 ? '; no latent fires, so no token carries it' : ', strongest first' + (D.shares ? '; the darker a token, the larger its share' : '; shares of tokens were not computed'))
    $('prompts').replaceChildren(...shown.map(p => line(p.row, tokensOf(p))))
    $('prompts').scrollTop = 0
    $('more').hidden = shown.length >= all
    $('more').textContent = `Show all ${all}`
    const partners = G.switchWith(head, chosen, 10), among = G.kept.length < D.scores.length ? ` of the ${G.kept.length} on this page` : ''
    $('switch-note').textContent = `The ten closest${among}, by the difference of the two shares` + (rows.length < 5 ? `. ${plural(rows.length, 'prompt')} prove${rows.length === 1 ? 's' : ''} little.` : '.')
    $('switch').tBodies[0].replaceChildren(...partners.map(r => el('tr', {},
      el('td', {}, el('button', {onclick: () => { chooseHead(r.k, r.code) }, title: `show ${G.name(r.head)}`}, G.name(r.head))), el('td', {}, said(r.code)), el('td', {}, per(r.inside)), el('td', {}, per(r.outside)), el('td', {}, (100*r.difference).toFixed(0)))))
  }

  function chooseCode(c) {
    chosen = c
    for (const tr of $('code-table').tBodies[0].rows) {
      const mine = Number(tr.dataset.code) === c
      tr.classList.toggle('chosen', mine); tr.querySelector('button').setAttribute('aria-pressed', mine)
      if (mine && (tr.offsetTop < tr.closest('.scroll').scrollTop || tr.offsetTop > tr.closest('.scroll').scrollTop + 500)) tr.closest('.scroll').scrollTop = tr.offsetTop - 60
    }
    showPrompts()
  }

  function chooseHead(k, c) {
    head = k; $('head').value = k
    const codes = G.codesOf(k), h = G.kept[k]
    $('codes-title').textContent = `${G.name(h)}: ${D.over === 'sum' ? `${D.score_name} ${num(D.scores[h])}` : plural(num(D.scores[h]), D.score_name.replace(/s$/, ''))}`
    $('code-table').tBodies[0].replaceChildren(...codes.map(r => el('tr', {'data-code': r.code, onclick: () => chooseCode(r.code)},
      el('td', {}, el('button', {'aria-pressed': false}, said(r.code))), el('td', {}, r.positives), el('td', {}, r.negatives), el('td', {}, r.unique ? '◆' : ''))))
    chooseCode(c ?? codes[0].code)
  }

  // The threshold: what is taken, the map of heads, the ROC curve.
  function map(cut) {
    const L = D.scores.length/D.n_heads, size = Math.min(22, 660/L), top = Math.max(...D.scores) || 1, W = L*size + 44, H = D.n_heads*size + 40
    const svg = el('svg', {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: 'img', 'aria-label': 'Heads by layer; the darker, the higher the score'})
    D.scores.forEach((s, h) => {
      const x = 36 + Math.floor(h/D.n_heads)*size, y = 4 + h % D.n_heads*size, grey = Math.round(255 - 175*Math.max(0, s/top)), on = s >= cut.threshold
      const cell = el('rect', {class: 'cell', x: x + 1.5, y: y + 1.5, width: size - 3, height: size - 3, fill: `rgb(${grey},${grey},${grey})`, stroke: on ? '#000' : '#ddd', 'stroke-width': on ? 2 : 1, onclick: () => open(h)},
        el('title', {}, `${G.name(h)}: ${num(s)}${on ? ', taken' : ''}${isTrue(h) ? ', in the ground truth' : ''}`))
      svg.append(cell)
      if (isTrue(h)) svg.append(el('circle', {cx: x + size/2, cy: y + size/2, r: size/5, fill: '#fff', stroke: '#d55e00', 'stroke-width': 2, 'pointer-events': 'none'}))
    })
    const step = L > 12 ? 5 : 1, mid = size/2 + 4
    for (let l = 0; l < L; l += step) svg.append(el('text', {x: 36 + l*size + size/2, y: H - 20, 'text-anchor': 'middle'}, l))
    for (let h = 0; h < D.n_heads; h += D.n_heads > 12 ? 4 : 1) svg.append(el('text', {x: 30, y: 4 + h*size + mid, 'text-anchor': 'end'}, h))
    svg.append(el('text', {x: 36 + L*size/2, y: H - 4, 'text-anchor': 'middle'}, 'layer'), el('text', {x: 10, y: 4 + D.n_heads*size/2, 'text-anchor': 'middle', transform: `rotate(-90 10 ${4 + D.n_heads*size/2})`}, 'head'))
    return svg
  }

  function roc(cut) {
    if (!D.truth) return el('p', {class: 'small'}, 'No ground truth was given, so precision, recall and the curve are not known.')
    const S = 240, x = v => 40 + S*v, y = v => 8 + S*(1 - v), svg = el('svg', {viewBox: '0 0 300 292', width: 300, height: 292, role: 'img', 'aria-label': `ROC curve; this threshold: false positive rate ${figure(cut.fpr)}, recall ${figure(cut.recall)}`})
    const points = [[0, 0], ...G.cuts.map(G.at).reverse().map(c => [c.fpr, c.recall])]
    svg.append(el('rect', {x: 40, y: 8, width: S, height: S, fill: 'none', stroke: '#999'}), el('line', {x1: x(0), y1: y(0), x2: x(1), y2: y(1), stroke: '#999', 'stroke-dasharray': '2 4'}),
      el('polyline', {points: points.map(([a, b]) => `${x(a)},${y(b)}`).join(' '), fill: 'none', stroke: '#222', 'stroke-width': 1.5}),
      el('circle', {id: 'point', cx: x(cut.fpr), cy: y(cut.recall), r: 6, fill: '#d55e00', stroke: '#fff', 'stroke-width': 1.5}))
    for (const v of [0, .5, 1]) svg.append(el('text', {x: x(v), y: S + 23, 'text-anchor': 'middle'}, v), el('text', {x: 34, y: y(v) + 4, 'text-anchor': 'end'}, v))
    svg.append(el('text', {x: x(.5), y: S + 42, 'text-anchor': 'middle'}, 'false positive rate'), el('text', {x: 10, y: y(.5), 'text-anchor': 'middle', transform: `rotate(-90 10 ${y(.5)})`}, 'recall'))
    return svg
  }

  function showCut() {
    const cut = G.at(G.cuts[$('threshold').value]), n = cut.heads.length, means = `at least ${num(cut.threshold)} ${D.score_name}`
    $('threshold-value').textContent = means
    $('threshold').setAttribute('aria-valuetext', `${means}: ${plural(n, 'head')}`)
    $('figures').replaceChildren(...[['heads', n], ['precision', figure(cut.precision)], ['recall', figure(cut.recall)], ['false positive rate', figure(cut.fpr)], [D.over === 'sum' ? 'share of all' : 'softmax threshold', cut.share.toExponential(2)]]
      .map(([k, v]) => el('div', {'data-figure': k}, el('dt', {}, k), el('dd', {}, v))))
    $('map-title').textContent = `${D.score_name[0].toUpperCase() + D.score_name.slice(1)} by head; black frame: taken${D.truth ? '; orange ring: in the ground truth' : ''}`
    $('map').replaceChildren(map(cut)); $('roc').replaceChildren(roc(cut))
    $('taken-title').textContent = `${plural(n, 'head')} taken`
    $('taken').replaceChildren(...cut.heads.slice(0, 60).map(h => el('button', {'data-head': h, onclick: () => open(h), disabled: G.rank.has(h) ? null : ''}, `${G.name(h)} ${num(D.scores[h])}${isTrue(h) ? ' ○' : ''}`)), n > 60 ? `and ${n - 60} more` : '')
  }

  function showPair(a, b, r) {
    const rows = G.rowsOf(a, r.a).filter(e => G.code(b, e) === r.b).slice(0, FIRST), all = r.positives + r.negatives
    for (const tr of $('pair-table').tBodies[0].rows) {
      const mine = tr.dataset.pair === `${r.a} ${r.b}`
      tr.classList.toggle('chosen', mine); tr.querySelector('button').setAttribute('aria-pressed', mine)
    }
    $('pair-note').textContent = `${rows.length < all ? `${rows.length} of ` : ''}${plural(all, 'prompt')} with ${G.name(G.kept[a])} at ${r.a} and ${G.name(G.kept[b])} at ${r.b}`
    $('pair-prompts').replaceChildren(...rows.map(e => line(e, el('span', {class: 'text'}, G.tokensOf(e).join('').replaceAll('\n', '⏎\n')))))
  }

  function showPairs() {
    const [a, b] = ['first', 'second'].map(id => Number($(id).value)), pairs = a === b ? [] : G.pairsOf(a, b), unique = pairs.filter(r => r.unique).length
    $('pairs-title').textContent = a === b ? 'Choose two different heads' : `${plural(pairs.length, 'pair')} of codes, ${unique} unique to positives`
    $('pair-a').textContent = `code of ${G.name(G.kept[a])}`; $('pair-b').textContent = `code of ${G.name(G.kept[b])}`
    $('pair-table').tBodies[0].replaceChildren(...pairs.map(r => el('tr', {'data-pair': `${r.a} ${r.b}`, onclick: () => showPair(a, b, r)},
      el('td', {}, el('button', {'aria-pressed': false}, r.a)), el('td', {}, r.b), el('td', {}, r.positives), el('td', {}, r.negatives), el('td', {}, r.unique ? '◆' : ''))))
    if (pairs.length) showPair(a, b, pairs[0])
    else { $('pair-note').textContent = ''; $('pair-prompts').replaceChildren() }
  }

  const tabs = [...document.querySelectorAll('[role=tab]')]
  function chooseTab(tab) {
    for (const t of tabs) {
      t.setAttribute('aria-selected', t === tab); t.tabIndex = t === tab ? 0 : -1
      $(t.getAttribute('aria-controls')).hidden = t !== tab
    }
  }
  tabs.forEach((t, i) => {
    t.addEventListener('click', () => chooseTab(t))
    t.addEventListener('keydown', e => {
      const to = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1}[e.key]
      if (to === undefined) return
      const next = tabs[(to + tabs.length) % tabs.length]
      e.preventDefault(); next.focus(); chooseTab(next)
    })
  })
  function open(h) { if (G.rank.has(h)) { chooseTab(tabs[0]); chooseHead(G.rank.get(h)) } }

  const options = () => G.kept.map((h, k) => el('option', {value: k}, `${G.name(h).padEnd(7, '\u00a0')}${num(D.scores[h]).padStart(4, '\u00a0')}${D.circuit.includes(h) ? ' ●' : '\u00a0\u00a0'}${isTrue(h) ? ' ○' : ''}`))
  for (const id of ['head', 'first', 'second']) $(id).append(...options())
  $('marks').textContent = `●\u00a0in the circuit${D.truth ? ` ○\u00a0in the ground truth (${D.truth_name})` : ''}`
  $('head').addEventListener('change', () => chooseHead(Number($('head').value)))
  $('more').addEventListener('click', () => showPrompts(Infinity))
  $('threshold').max = G.cuts.length - 1
  $('threshold').value = Math.max(0, G.cuts.findIndex(t => t >= D.threshold))
  $('threshold').addEventListener('input', showCut)
  $('second').value = Math.min(1, G.kept.length - 1)
  for (const id of ['first', 'second']) $(id).addEventListener('change', showPairs)
  $('viewer').hidden = false
  chooseHead(0); showCut(); showPairs()
}

if (typeof DecompressionStream === 'undefined') document.getElementById('trouble').textContent = 'This browser is too old for this page: it cannot unpack its data (Chrome 80, Firefox 113, Safari 16.4 or later can).'
else unpack(PACKED).then(view).catch(e => { document.getElementById('trouble').textContent = `The page cannot show its data: ${e.message}`; throw e })
