'use strict'

// The page holds one deflated array of bytes: the length of a JSON header, the header, then the arrays that it lists.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0))
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'))
  const buffer = await new Response(stream).arrayBuffer()
  const length = new DataView(buffer).getUint32(0, true)
  const D = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)))
  const types = {1: Uint8Array, 2: Uint16Array, 4: Uint32Array}
  let start = 4 + length
  for (const [name, width, n] of D.arrays) {
    const end = start + width * n
    D[name] = new types[width](buffer.slice(start, end))
    start = end
  }
  return D
}

// Answers. Each function returns what the method of the Python `Inspector` with the same name returns.
// A head is given by its place `k` on this page; `kept[k]` is its index in the model.
function inspector(D) {
  const N = D.labels.length
  const kept = D.heads
  const placeOf = new Map(kept.map((h, k) => [h, k]))
  const starts = [0]
  for (const n of D.lengths) starts.push(starts.at(-1) + n)

  const code = (k, row) => D.codes[k * N + row] - 1 // -1: no active latent
  const name = h => `L${Math.floor(h / D.n_heads)}H${h % D.n_heads}`
  const tokensOf = row => Array.from(D.tokens.subarray(starts[row], starts[row + 1]), t => D.vocabulary[t])
  const orderOf = k => D.order.subarray(k * N, (k + 1) * N)
  const rowsOf = (k, c) => Array.from(orderOf(k)).filter(row => code(k, row) === c)
  const byCount = (a, b) => b.positives - a.positives || a.negatives - b.negatives

  function count(found, key, row, fields) {
    if (!found.has(key)) found.set(key, {...fields, positives: 0, negatives: 0})
    found.get(key)[D.labels[row] ? 'positives' : 'negatives']++
  }

  function codesOf(k) {
    const found = new Map()
    for (let row = 0; row < N; row++) count(found, code(k, row), row, {code: code(k, row)})
    const codes = [...found.values()]
    for (const r of codes) r.unique = r.code >= 0 && r.positives > 0 && r.negatives === 0
    return codes.sort((a, b) => (a.code < 0) - (b.code < 0) || byCount(a, b) || a.code - b.code)
  }

  function pairsOf(a, b) {
    const found = new Map()
    for (let row = 0; row < N; row++) {
      const x = code(a, row)
      const y = code(b, row)
      if (x >= 0 && y >= 0) count(found, `${x} ${y}`, row, {a: x, b: y})
    }
    const pairs = [...found.values()]
    for (const r of pairs) r.unique = r.positives > 0 && r.negatives === 0
    return pairs.sort((p, q) => byCount(p, q) || p.a - q.a || p.b - q.b)
  }

  // Shares are stored head by head and code by code, for the first prompts of each code only.
  const sharePlaces = []
  function sharePlacesOf(k) {
    let end = 0
    for (let j = 0; j <= k; j++) {
      if (!sharePlaces[j]) {
        const places = new Map()
        const seen = new Map()
        for (const row of orderOf(j)) {
          const c = code(j, row)
          seen.set(c, (seen.get(c) || 0) + 1)
          if (c < 0 || (D.prompts !== null && seen.get(c) > D.prompts)) continue
          places.set(row, end)
          end += D.lengths[row]
        }
        sharePlaces[j] = {places, end}
      }
      end = sharePlaces[j].end
    }
    return sharePlaces[k].places
  }

  function promptsOf(k, c, n) {
    const places = c >= 0 ? sharePlacesOf(k) : new Map()
    const shares = row => {
      const start = places.get(row)
      return start === undefined ? null : Array.from(D.shares.subarray(start, start + D.lengths[row]), s => s / 255)
    }
    const rows = rowsOf(k, c).slice(0, Math.min(n, D.prompts ?? n))
    return rows.map(row => ({row, tokens: tokensOf(row), shares: shares(row)}))
  }

  function partnerOf(k, inside, nInside) {
    const counts = new Map()
    for (let row = 0; row < N; row++) {
      if (inside[row]) counts.set(code(k, row), (counts.get(code(k, row)) || 0) + 1)
    }
    const [mode, most] = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0])[0]
    let others = 0
    for (let row = 0; row < N; row++) others += !inside[row] && code(k, row) === mode
    const r = {k, head: kept[k], code: mode, inside: most / nInside, outside: others / Math.max(N - nInside, 1)}
    return {...r, difference: r.inside - r.outside}
  }

  function switchWith(k, c, n) {
    const rows = rowsOf(k, c)
    const inside = new Uint8Array(N)
    for (const row of rows) inside[row] = 1
    const partners = kept.map((_, j) => j).filter(j => j !== k).map(j => partnerOf(j, inside, rows.length))
    return partners.sort((a, b) => b.difference - a.difference || a.head - b.head).slice(0, n)
  }

  const ranked = D.scores.map((_, h) => h).sort((a, b) => D.scores[b] - D.scores[a] || a - b)
  const allThresholds = [...new Set(D.scores)].sort((a, b) => a - b)

  // The threshold as `predict_circuit` takes it: a share of the sum, or a softmax probability.
  function probability(threshold) {
    const top = D.scores[ranked[0]]
    const part = D.over === 'sum' ? s => s : s => Math.exp(s - top)
    return Math.min(1, part(threshold) / D.scores.reduce((sum, s) => sum + part(s), 0))
  }

  function at(threshold) {
    const heads = ranked.filter(h => D.scores[h] >= threshold)
    const cut = {threshold, prob: probability(threshold), heads}
    if (!D.truth) return cut
    const right = heads.filter(h => D.truth.includes(h)).length
    const n = D.truth.length
    cut.precision = heads.length ? right / heads.length : null
    cut.recall = right / Math.max(n, 1)
    cut.falsePositiveRate = (heads.length - right) / Math.max(D.scores.length - n, 1)
    return cut
  }

  // The attribution of a head by the code of the positive; the first pairs only have an attribution.
  function attributionOf(k) {
    const pairs = D.attribution.pairs[k]
    const found = new Map()
    pairs.forEach((a, row) => {
      const c = code(k, row)
      if (!found.has(c)) found.set(c, {code: c, pairs: 0, sum: 0, size: 0})
      const r = found.get(c)
      r.pairs++
      r.sum += a
      r.size += Math.abs(a)
    })
    const whole = Math.max(pairs.reduce((sum, a) => sum + Math.abs(a), 0), 1e-12)
    const rows = [...found.values()].map(r => ({...r, attribution: r.sum / r.pairs, share: r.size / whole}))
    return rows.sort((a, b) => b.share - a.share || a.code - b.code)
  }

  return {attributionOf, name, allThresholds, kept, placeOf, code, tokensOf, codesOf, rowsOf, promptsOf, switchWith, at, pairsOf}
}

// Drawing. Text goes into the page as text, never as markup.
const $ = id => document.getElementById(id)
const SVG = ['svg', 'rect', 'line', 'polyline', 'circle', 'text', 'title']

function el(tag, attributes = {}, ...children) {
  const svg = SVG.includes(tag)
  const e = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
  for (const [k, v] of Object.entries(attributes)) {
    if (k === 'onclick') e.addEventListener('click', v)
    else if (v !== null) e.setAttribute(k, v)
  }
  e.append(...children.map(c => c instanceof Node ? c : String(c)))
  return e
}

const fillTable = (id, rows) => $(id).tBodies[0].replaceChildren(...rows)
const tableRow = (attributes, ...cells) => el('tr', attributes, ...cells.map(c => el('td', {}, c)))
const percent = x => `${Math.round(100 * x)} %`
const codeName = c => c < 0 ? 'no latent' : c
const plural = (n, thing) => `${n} ${thing}${n === 1 ? '' : 's'}`
const decimals = x => x === undefined || x === null ? '–' : x.toFixed(3)
const signed = x => `${x < 0 ? '−' : '+'}${(100 * Math.abs(x)).toFixed(1)} %`
const number = x => Number.isInteger(x) ? String(x) : x.toPrecision(4)
const tokenName = t => t.trim() || (t ? 'space' : 'empty token')
const showBreaks = t => t.replaceAll('\n', '⏎\n')

function view(D) {
  const I = inspector(D)
  const isTrue = h => D.truth && D.truth.includes(h)
  const FIRST = 20 // prompts shown before the button
  let head = 0
  let chosen = null

  // Prompts
  function shadedToken(token, share, most) {
    const attributes = {
      class: share === most ? 'token most' : 'token',
      style: `--share:${(share / most).toFixed(3)}`,
      'data-share': share.toFixed(4),
      title: `${tokenName(token)}: share ${percent(share)}`,
    }
    return el('span', attributes, showBreaks(token))
  }

  function promptText(prompt) {
    const {tokens, shares} = prompt
    const text = el('span', {class: 'text'})
    const most = shares ? Math.max(...shares) : 0
    tokens.forEach((token, i) => {
      if (most && shares[i]) text.append(shadedToken(token, shares[i], most))
      else text.append(el('span', {title: shares ? 'share 0 %' : null}, showBreaks(token)))
    })
    if (!most) return text
    const largest = shares.map((s, i) => [s, i]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, 3)
    const named = largest.filter(([s]) => s >= .05).map(([s, i]) => `${tokenName(tokens[i])} ${percent(s)}`)
    return el('span', {}, text, el('span', {class: 'carried'}, named.join(' · ')))
  }

  function promptLine(row, text) {
    const positive = D.labels[row]
    const label = el('span', {class: positive ? 'label positive' : 'label'}, positive ? 'positive' : 'negative')
    return el('li', {'data-row': row}, label, text)
  }

  function showPrompts(n = FIRST) {
    const rows = I.rowsOf(head, chosen)
    const shown = I.promptsOf(head, chosen, n)
    const available = Math.min(rows.length, D.prompts ?? rows.length)
    const what = chosen < 0 ? 'no active latent' : `code ${chosen}`
    $('prompts-title').textContent = `Prompts of ${I.name(I.kept[head])}, ${what}`
    const count = (shown.length < rows.length ? `${shown.length} of ` : '') + plural(rows.length, 'prompt')
    $('prompts-note').textContent = count + (chosen < 0
      ? '. No latent is active, so no token has a share.'
      : ', strongest first. The darker a token, the larger its share.')
    $('prompts').replaceChildren(...shown.map(p => promptLine(p.row, promptText(p))))
    $('prompts').scrollTop = 0
    $('more').hidden = shown.length >= available
    $('more').textContent = `Show all ${available}`
    showPartners(rows.length)
  }

  function showPartners(nPrompts) {
    const among = I.kept.length < D.scores.length ? ` among the ${I.kept.length} on this page` : ''
    const few = nPrompts < 5 ? ` This code has only ${plural(nPrompts, 'prompt')}: partners may be due to chance.` : ''
    $('switch-note').textContent = `The ten closest heads${among}, by the difference of the two percentages.${few}`
    fillTable('switch', I.switchWith(head, chosen, 10).map(r => {
      const go = el('button', {onclick: () => chooseHead(r.k, r.code), title: `Show ${I.name(r.head)}`}, I.name(r.head))
      return tableRow({}, go, codeName(r.code), percent(r.inside), percent(r.outside), (100 * r.difference).toFixed(0))
    }))
  }

  // Codes and heads
  function markRow(table, isChosen) {
    let chosenRow = null
    for (const tr of $(table).tBodies[0].rows) {
      const mine = isChosen(tr)
      tr.classList.toggle('chosen', mine)
      tr.querySelector('button').setAttribute('aria-pressed', mine)
      if (mine) chosenRow = tr
    }
    return chosenRow
  }

  function chooseCode(c) {
    chosen = c
    const tr = markRow('code-table', tr => Number(tr.dataset.code) === c)
    const box = tr.closest('.scroll')
    if (tr.offsetTop < box.scrollTop || tr.offsetTop > box.scrollTop + 500) box.scrollTop = tr.offsetTop - 60
    showPrompts()
  }

  function chooseHead(k, c) {
    head = k
    $('head').value = k
    const codes = I.codesOf(k)
    const h = I.kept[k]
    $('codes-title').textContent = `${I.name(h)}: ${D.score_name} ${number(D.scores[h])}`
    $('codes-note').textContent = numbersOf(h)
    $('attribution-head').value = k
    showFlow()
    fillTable('code-table', codes.map(r => {
      const button = el('button', {'aria-pressed': false}, codeName(r.code))
      const attributes = {'data-code': r.code, onclick: () => chooseCode(r.code)}
      return tableRow(attributes, button, r.positives, r.negatives, r.unique ? '◆' : '')
    }))
    chooseCode(c ?? codes[0].code)
  }

  function openHead(h) {
    if (!I.placeOf.has(h)) return
    chooseTab(tabs[0])
    chooseHead(I.placeOf.get(h))
  }

  // Effect and attribution of a head, as a sentence
  function numbersOf(h) {
    const parts = []
    const e = D.effects && D.effects[h]
    if (e) parts.push(`effect ${signed(e[0])} ± ${(100 * e[1]).toFixed(1)} % (${plural(e[2], 'pair')})`)
    if (D.effects && !e) parts.push('not patched; the score is an estimate')
    if (D.screen) parts.push(`${D.screen_name} ${signed(D.screen[h])}`)
    return parts.join(' · ')
  }

  // Attribution by position and by code, and edges
  function barChart(values, labels) {
    const width = 410
    const rowHeight = 17
    const left = labels.some(label => label.length > 4) ? 120 : 34
    const height = values.length * rowHeight + 6
    const top = Math.max(...values.map(Math.abs), 1e-9)
    const low = Math.min(0, ...values)
    const high = Math.max(0, ...values)
    const x = v => left + (width - left - 62) * (v - low) / Math.max(high - low, 1e-9)
    const svg = el('svg', {viewBox: `0 0 ${width} ${height}`, width, height, role: 'img', 'aria-label': 'Attribution by position'})
    values.forEach((v, i) => {
      const y = 4 + i * rowHeight
      const bar = {x: Math.min(x(0), x(v)), y, width: Math.abs(x(v) - x(0)), height: rowHeight - 4, 'data-value': v}
      svg.append(
        el('text', {x: left - 8, y: y + 10, 'text-anchor': 'end'}, labels[i]),
        el('rect', {...bar, class: 'bar', fill: Math.abs(v) === top ? '#d55e00' : '#888'}),
        el('text', {x: x(Math.max(v, 0)) + 4, y: y + 10}, signed(v)))
    })
    svg.append(el('line', {x1: x(0), y1: 0, x2: x(0), y2: height, stroke: '#222'}))
    return svg
  }

  function showEdges(k) {
    const go = h => el('button', {onclick: () => I.placeOf.has(h) && chooseHead(I.placeOf.get(h)), disabled: I.placeOf.has(h) ? null : ''}, I.name(h))
    const rows = [['from', D.edges[k].from], ['to', D.edges[k].to]].flatMap(([direction, edges]) =>
      edges.map(([h, v]) => tableRow({'data-direction': direction}, direction, go(h), number(v))))
    fillTable('attribution-edges', rows)
    $('edges-caption').textContent = `Strongest edges (${D.edge_name})`
  }

  function showFlow() {
    const h = I.kept[head]
    $('attribution-title').textContent = `${I.name(h)}: ${D.score_name} ${number(D.scores[h])}`
    $('attribution-note').textContent = numbersOf(h)
    showEdges(head)
    for (const id of ['by-position', 'by-code']) $(id).hidden = !D.attribution
    if (!D.attribution) return
    const values = D.attribution.positions[head]
    const row = D.lengths.findIndex((n, i) => i < D.labels.length / 2 && n === values.length)
    const tokens = row < 0 ? [] : I.tokensOf(row)
    const labels = values.map((_, i) => `${row < 0 ? '' : tokenName(showBreaks(tokens[i])).slice(0, 14)} ${i - values.length}`.trim())
    $('attribution-positions').replaceChildren(barChart(values, labels))
    $('attribution-positions-note').textContent = `Mean over ${plural(D.attribution.n_pairs, 'pair')}; positions count from the end. `
      + (row < 0 ? '' : 'The tokens are those of one prompt.')
    fillTable('attribution-codes', I.attributionOf(head).map(r =>
      tableRow({}, codeName(r.code), r.pairs, signed(r.attribution), percent(r.share))))
  }

  // Features
  let featureHead = 0
  let card = null

  function valuedToken(token, value, most) {
    if (!value) return el('span', {}, showBreaks(token))
    const attributes = {
      class: value === most ? 'token most' : 'token', style: `--share:${Math.max(0, value / most).toFixed(3)}`,
      'data-value': value, title: `${tokenName(token)}: ${value.toPrecision(3)}`,
    }
    return el('span', attributes, showBreaks(token))
  }

  function exampleLine(example) {
    const [tokens, values, , source] = example
    const most = Math.max(...values)
    const text = el('span', {class: 'text'}, ...tokens.map((t, i) => valuedToken(t, values[i], most)))
    return el('li', {}, el('span', {class: source === 'positive' ? 'label positive' : 'label'}, source), text)
  }

  const logits = rows => rows.map(([t, v]) =>
    el('span', {class: 'logit'}, el('code', {}, showBreaks(t)), ` ${v > 0 ? '+' : '−'}${Math.abs(v).toFixed(2)}`))

  function showCard(F, c) {
    card = c.feature
    markRow('feature-table', tr => Number(tr.dataset.feature) === card)
    $('feature-title').textContent = `Feature ${c.feature} of ${I.name(F.head)}`
    const facts = [`active on ${(100 * c.density).toFixed(2)} % of the tokens of the text`]
    if (c.effect !== null) facts.unshift(`effect ${signed(c.effect)} ± ${(100 * c.half).toFixed(1)} %`)
    if (c.where !== null) facts.push(`strongest at position ${c.where}`)
    const heads = Object.entries(c.heads)
    if (heads.length > 1) facts.push(heads.slice(0, 4).map(([h, v]) => `${h} ${percent(v)}`).join(', '))
    for (const [site, j, v] of c.upstream || []) facts.push(`fed by ${site} #${j} (${signed(v)})`)
    $('feature-facts').textContent = facts.join(' · ')
    $('feature-writes').replaceChildren(
      el('dt', {}, 'writes'), el('dd', {}, ...logits(c.promoted)),
      el('dt', {}, 'writes against'), el('dd', {}, ...logits(c.suppressed)))
    $('feature-prompts').replaceChildren(...c.prompts.map(exampleLine))
    $('feature-texts').replaceChildren(...c.examples.map(exampleLine))
    $('feature-texts-title').hidden = $('feature-texts').hidden = !c.examples.length
  }

  function offCurve(F, step) {
    const values = F.off.metric.slice(0, -1)
    const all = F.off.metric.at(-1)
    const low = Math.min(0, all, ...values)
    const high = Math.max(all, ...values)
    const x = i => 44 + 230 * i / Math.max(values.length - 1, 1)
    const y = v => 10 + 150 * (high - v) / Math.max(high - low, 1e-9)
    const svg = el('svg', {viewBox: '0 0 360 200', width: 360, height: 200, role: 'img', 'aria-label': $('off-value').textContent})
    svg.append(
      el('line', {x1: 44, y1: y(0), x2: 274, y2: y(0), stroke: '#999'}),
      el('line', {x1: 44, y1: y(all), x2: 274, y2: y(all), stroke: '#d55e00', 'stroke-dasharray': '4 3'}),
      el('text', {x: 278, y: y(all) + 4}, `all ${F.width} off`),
      el('polyline', {points: values.map((v, i) => `${x(i)},${y(v)}`).join(' '), fill: 'none', stroke: '#222', 'stroke-width': 1.5}),
      ...values.map((v, i) => el('circle', {cx: x(i), cy: y(v), r: 2.5, fill: '#222'})))
    const at = step < values.length ? [x(step), y(values[step])] : [x(values.length - 1), y(all)]
    svg.append(el('circle', {id: 'off-point', cx: at[0], cy: at[1], r: 6, fill: '#d55e00', stroke: '#fff'}))
    for (const v of [...new Set([0, high])]) svg.append(el('text', {x: 38, y: y(v) + 4, 'text-anchor': 'end'}, v.toFixed(1)))
    for (const i of [0, values.length - 1]) svg.append(el('text', {x: x(i), y: 178, 'text-anchor': 'middle'}, i))
    svg.append(el('text', {x: 159, y: 194, 'text-anchor': 'middle'}, 'features switched off'))
    return svg
  }

  function showOff() {
    const F = D.features[featureHead]
    const step = Number($('off').value)
    const last = F.off.metric.length - 1
    const prob = F.off.answer_prob.length ? `, probability of the answer ${percent(F.off.answer_prob[step])}` : ''
    const metric = F.off.metric_name === 'logit_diff' ? 'log odds of the answer' : 'KL divergence from the negative'
    const what = step === last ? `all ${F.width}` : step
    $('off-value').textContent = `${what}: ${metric} ${F.off.metric[step].toFixed(2)}${prob}`
    $('off').setAttribute('aria-valuetext', $('off-value').textContent)
    $('off-caption').textContent = `Mean ${metric}`
    $('off-curve').replaceChildren(offCurve(F, step))
    fillTable('off-table', F.off.top[step].map((tokens, i) => {
      const next = tokens.map(([t, p]) => {
        const answer = F.off.answers[i].includes(t)
        return el('span', {class: answer ? 'next answer' : 'next'}, `${showBreaks(t).trim() || tokenName(t)} ${percent(p)}`)
      })
      return el('tr', {}, el('td', {}, F.off.prompts[i]), el('td', {}, ...next))
    }))
  }

  function chooseFeatures(i) {
    featureHead = i
    const F = D.features[i]
    const n = F.cards.length
    const e = D.effects && D.effects[F.head]
    const part = F.fraction.at(-1)
    $('feature-head').value = i
    $('features-title').textContent = `${I.name(F.head)}: ${n} features of ${F.width}`
    $('features-note').textContent = `Switched off together, the ${n} features have ${percent(part)} of the effect of all ${F.width}.`
      + (e ? ` Effect of the whole head: ${signed(e[0])}.` : '')
    fillTable('feature-table', F.cards.map(c => {
      const button = el('button', {'aria-pressed': false}, c.feature)
      const cells = [button, c.effect === null ? '–' : signed(c.effect), c.where ?? '–'].map(x => el('td', {}, x))
      const attributes = {'data-feature': c.feature, onclick: () => showCard(F, c)}
      return el('tr', attributes, ...cells, el('td', {class: 'left'}, c.words))
    }))
    showCard(F, F.cards[0])
    $('off').max = F.off.metric.length - 1
    $('off').value = 0
    $('off-note').textContent = 'A feature that is switched off has its value on the negative prompt. The last step has all features off.'
    showOff()
  }

  // The threshold: the selected heads, the map of heads, the ROC curve
  function cellOf(h, cut, size, top) {
    const x = 36 + Math.floor(h / D.n_heads) * size
    const y = 4 + h % D.n_heads * size
    const grey = Math.round(255 - 175 * Math.max(0, D.scores[h] / top))
    const selected = D.scores[h] >= cut.threshold
    const title = I.name(h) + `: ${number(D.scores[h])}` + (selected ? ', selected' : '')
    const attributes = {
      class: 'cell', x: x + 1.5, y: y + 1.5, width: size - 3, height: size - 3, fill: `rgb(${grey},${grey},${grey})`,
      stroke: selected ? '#000' : '#ddd', 'stroke-width': selected ? 2 : 1, onclick: () => openHead(h),
    }
    const cell = el('rect', attributes, el('title', {}, title + (isTrue(h) ? ', in the ground truth' : '')))
    if (!isTrue(h)) return [cell]
    const ring = {fill: '#fff', stroke: '#d55e00', 'stroke-width': 2, 'pointer-events': 'none'}
    return [cell, el('circle', {cx: x + size / 2, cy: y + size / 2, r: size / 5, ...ring})]
  }

  function headMap(cut) {
    const nLayers = D.scores.length / D.n_heads
    const size = Math.min(22, 660 / nLayers)
    const top = Math.max(...D.scores) || 1
    const width = nLayers * size + 44
    const height = D.n_heads * size + 40
    const label = 'Heads by layer; darker cells have higher scores'
    const svg = el('svg', {viewBox: `0 0 ${width} ${height}`, width, height, role: 'img', 'aria-label': label})
    svg.append(...D.scores.flatMap((_, h) => cellOf(h, cut, size, top)))
    for (let l = 0; l < nLayers; l += nLayers > 12 ? 5 : 1) {
      svg.append(el('text', {x: 36 + (l + .5) * size, y: height - 20, 'text-anchor': 'middle'}, l))
    }
    for (let h = 0; h < D.n_heads; h += D.n_heads > 12 ? 4 : 1) {
      svg.append(el('text', {x: 30, y: 8 + (h + .5) * size, 'text-anchor': 'end'}, h))
    }
    const middle = 4 + D.n_heads * size / 2
    svg.append(
      el('text', {x: 36 + nLayers * size / 2, y: height - 4, 'text-anchor': 'middle'}, 'layer'),
      el('text', {x: 10, y: middle, 'text-anchor': 'middle', transform: `rotate(-90 10 ${middle})`}, 'head'))
    return svg
  }

  function rocCurve(cut) {
    if (!D.truth) {
      const text = 'No ground truth was given, so precision, recall and the ROC curve are unknown.'
      return el('p', {class: 'small'}, text)
    }
    const size = 240
    const x = v => 40 + size * v
    const y = v => 8 + size * (1 - v)
    const label = `ROC curve. At this threshold: false positive rate ${decimals(cut.falsePositiveRate)}, `
      + `recall ${decimals(cut.recall)}`
    const svg = el('svg', {viewBox: '0 0 300 292', width: 300, height: 292, role: 'img', 'aria-label': label})
    const cuts = I.allThresholds.map(I.at).reverse()
    const points = [[0, 0], ...cuts.map(c => [c.falsePositiveRate, c.recall])].map(([a, b]) => `${x(a)},${y(b)}`)
    const point = {id: 'point', cx: x(cut.falsePositiveRate), cy: y(cut.recall), r: 6, fill: '#d55e00', stroke: '#fff'}
    svg.append(
      el('rect', {x: 40, y: 8, width: size, height: size, fill: 'none', stroke: '#999'}),
      el('line', {x1: x(0), y1: y(0), x2: x(1), y2: y(1), stroke: '#999', 'stroke-dasharray': '2 4'}),
      el('polyline', {points: points.join(' '), fill: 'none', stroke: '#222', 'stroke-width': 1.5}),
      el('circle', point))
    for (const v of [0, .5, 1]) {
      svg.append(
        el('text', {x: x(v), y: size + 23, 'text-anchor': 'middle'}, v),
        el('text', {x: 34, y: y(v) + 4, 'text-anchor': 'end'}, v))
    }
    svg.append(
      el('text', {x: x(.5), y: size + 42, 'text-anchor': 'middle'}, 'false positive rate'),
      el('text', {x: 10, y: y(.5), 'text-anchor': 'middle', transform: `rotate(-90 10 ${y(.5)})`}, 'recall'))
    return svg
  }

  function selectedButton(h) {
    const disabled = I.placeOf.has(h) ? null : ''
    const text = `${I.name(h)} ${number(D.scores[h])}${isTrue(h) ? ' ○' : ''}`
    return el('button', {'data-head': h, onclick: () => openHead(h), disabled}, text)
  }

  function showCut() {
    const cut = I.at(I.allThresholds[$('threshold').value])
    const n = cut.heads.length
    const means = `${D.score_name} of at least ${number(cut.threshold)}`
    $('threshold-value').textContent = means
    $('threshold').setAttribute('aria-valuetext', `${means}: ${plural(n, 'head')}`)
    const figures = {
      heads: n,
      precision: decimals(cut.precision),
      recall: decimals(cut.recall),
      'false positive rate': decimals(cut.falsePositiveRate),
      [D.over === 'sum' ? 'share of all scores' : 'softmax probability']: cut.prob.toExponential(2),
    }
    $('figures').replaceChildren(...Object.entries(figures).map(([k, v]) =>
      el('div', {'data-figure': k}, el('dt', {}, k), el('dd', {}, v))))
    const ring = D.truth ? '; orange ring: in the ground truth' : ''
    const name = D.score_name[0].toUpperCase() + D.score_name.slice(1)
    $('map-title').textContent = `${name} of every head; black frame: selected${ring}`
    $('map').replaceChildren(headMap(cut))
    $('roc').replaceChildren(rocCurve(cut))
    $('selected-title').textContent = `${plural(n, 'head')} selected`
    $('selected').replaceChildren(...cut.heads.slice(0, 60).map(selectedButton), n > 60 ? `and ${n - 60} more` : '')
  }

  // Two heads
  function showPair(a, b, r) {
    const rows = I.rowsOf(a, r.a).filter(row => I.code(b, row) === r.b).slice(0, FIRST)
    const all = r.positives + r.negatives
    markRow('pair-table', tr => tr.dataset.pair === `${r.a} ${r.b}`)
    const count = (rows.length < all ? `${rows.length} of ` : '') + plural(all, 'prompt')
    const codes = `${I.name(I.kept[a])} has code ${r.a} and ${I.name(I.kept[b])} has code ${r.b}`
    $('pair-note').textContent = `${count} on which ${codes}`
    $('pair-prompts').replaceChildren(...rows.map(row =>
      promptLine(row, el('span', {class: 'text'}, showBreaks(I.tokensOf(row).join(''))))))
  }

  function showPairs() {
    const a = Number($('first').value)
    const b = Number($('second').value)
    const pairs = a === b ? [] : I.pairsOf(a, b)
    const nUnique = pairs.filter(r => r.unique).length
    $('pairs-title').textContent = a === b
      ? 'Choose two different heads'
      : `${plural(pairs.length, 'pair')} of codes, ${nUnique} unique to positives`
    $('pair-a').textContent = `code of ${I.name(I.kept[a])}`
    $('pair-b').textContent = `code of ${I.name(I.kept[b])}`
    fillTable('pair-table', pairs.map(r => {
      const attributes = {'data-pair': `${r.a} ${r.b}`, onclick: () => showPair(a, b, r)}
      const button = el('button', {'aria-pressed': false}, r.a)
      return tableRow(attributes, button, r.b, r.positives, r.negatives, r.unique ? '◆' : '')
    }))
    if (pairs.length) return showPair(a, b, pairs[0])
    $('pair-note').textContent = ''
    $('pair-prompts').replaceChildren()
  }

  // Tabs
  $('tab-features').hidden = !D.features.length
  const tabs = [...document.querySelectorAll('[role=tab]')].filter(tab => !tab.hidden)
  function chooseTab(tab) {
    for (const t of tabs) {
      t.setAttribute('aria-selected', t === tab)
      t.tabIndex = t === tab ? 0 : -1
      $(t.getAttribute('aria-controls')).hidden = t !== tab
    }
  }
  tabs.forEach((tab, i) => {
    tab.addEventListener('click', () => chooseTab(tab))
    tab.addEventListener('keydown', e => {
      const to = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1}[e.key]
      if (to === undefined) return
      const next = tabs[(to + tabs.length) % tabs.length]
      e.preventDefault()
      next.focus()
      chooseTab(next)
    })
  })

  // Start
  function headOption(h, k) {
    const space = '\u00a0'
    const score = number(D.scores[h]).padStart(4, space)
    const marks = (D.circuit.includes(h) ? ' ●' : space + space) + (isTrue(h) ? ' ○' : '')
    return el('option', {value: k}, I.name(h).padEnd(7, space) + score + marks)
  }
  for (const id of ['head', 'attribution-head', 'first', 'second']) $(id).append(...I.kept.map(headOption))
  const truthMark = D.truth ? ` ○\u00a0in the ground truth (${D.truth_name})` : ''
  $('marks').textContent = `●\u00a0in the circuit${truthMark}`
  for (const id of ['head', 'attribution-head']) $(id).addEventListener('change', () => chooseHead(Number($(id).value)))
  $('feature-head').append(...D.features.map((F, i) => el('option', {value: i}, I.name(F.head))))
  $('feature-head').addEventListener('change', () => chooseFeatures(Number($('feature-head').value)))
  $('off').addEventListener('input', showOff)
  $('head-note').textContent = D.features.length ? `Features: ${D.features.map(F => I.name(F.head)).join(', ')}` : ''
  $('more').addEventListener('click', () => showPrompts(Infinity))
  $('threshold').max = I.allThresholds.length - 1
  $('threshold').value = Math.max(0, I.allThresholds.findIndex(t => t >= D.circuit_threshold))
  $('threshold').addEventListener('input', showCut)
  $('second').value = Math.min(1, I.kept.length - 1)
  for (const id of ['first', 'second']) $(id).addEventListener('change', showPairs)
  $('viewer').hidden = false
  if (D.features.length) chooseFeatures(0)
  chooseHead(0)
  showCut()
  showPairs()
}

if (typeof DecompressionStream === 'undefined') {
  $('trouble').textContent = 'This browser is too old to unpack the data of this page. '
    + 'Use Chrome 80, Firefox 113, Safari 16.4 or a later version.'
} else {
  unpack(PACKED).then(view).catch(e => {
    $('trouble').textContent = `The page cannot show its data: ${e.message}`
    throw e
  })
}
