// The page of one run: losses, and for one layer at a time its heat map and curves. All of them share one cursor, which is a step.

const page = JSON.parse(document.getElementById('run-data').textContent),
  at = id => document.getElementById(id),
  when = at('when'),
  fixedViews = []
let series = [], step = null

const columnOf = (axis, s) => s === null ? null : lastAtMost(axis.steps.slice(0, -1), s)
const mark = () => { for (const v of [...fixedViews, ...series]) v.mark(columnOf(v.axis, step)) }
// The pointer is on column c of an axis, or nowhere.
const pointed = axis => c => {
  step = c === null ? null : axis.steps[c]
  when.textContent = c === null ? '' : axis.where[c]
  mark()
}
const several = (axis, c) => axis.starts[c + 1] - axis.starts[c] > 1
const valueOf = (axis, l, c) => {
  const bad = (l.bad || []).find(([k]) => k == c)?.[1],
    n = axis.starts[c + 1] - axis.starts[c]
  if (bad == n) return n > 1 ? 'all NaN or infinite' : short(l.y[c])
  if (Number.isNaN(l.y[c]) && !bad) return 'no values'
  return short(l.y[c]) + (l.lo && n > 1 ? ` (${short(l.lo[c])} to ${short(l.hi[c])})` : '') + (bad ? `, ${bad} NaN or infinite` : '')
}

const drawLosses = async () => {
  const { axis, train, valid } = page.losses
  if (!train) return
  const [l] = lines(await unpackFloats(train), axis, 1),
    each = valid.dots ? await unpackFloats(valid.dots) : [],
    means = valid.mean ? await unpackFloats(valid.mean) : [],
    colour = 'var(--valid)'
  Object.assign(l, { colour: 'var(--train)', bad: page.losses.bad })
  const after = c => valid.x.findIndex(x => x >= axis.starts[c + 1]),
    text = c => {
      const k = after(c),
        v = k < 0 ? '' : ` \u00b7 validation after it ${short(means[k])}` + (valid.bad[k] ? `, ${valid.bad[k]} of ${valid.n[k]} NaN or infinite` : '')
      return 'training ' + valueOf(axis, l, c) + v
    }
  const legend = [{ name: 'training', colour: l.colour }, ...(valid.x.length ? [{ name: 'validation', colour, dot: true }] : [])]
  fixedViews.push(chart(at('loss-chart'), axis, {
    title: 'loss', legend, lines: [l], names: true, xlabel: true, height: 300, choose: true,
    dots: [{ x: valid.at, y: each, colour, kind: 'faint' }, { x: valid.x, y: means, colour, r: 3.5 }] }, pointed(axis), text))
  mark()
}

const drawRates = async () => {
  const axis = page.lr && page.quantities[page.lr.quantity].heat
  if (!axis) return
  const of = lines(await unpackFloats(page.lr.data), axis, page.lr.names.length)
  of.forEach((l, i) => Object.assign(l, { colour: `var(--q${i % 5})` }))
  const legend = of.length > 1 ? of.map((l, i) => ({ name: page.lr.names[i], colour: l.colour })) : []
  fixedViews.push(chart(at('loss-chart'), axis, { title: 'learning rate', lines: of, legend, height: 110, log: false, against: 'step' }, pointed(axis),
    c => of.map(l => short(l.y[c])).join(' \u00b7 ')))
  mark()
}

const drawLayers = () => {
  const side = at('layer-side'),
    heats = page.quantities.map((q, k) => {
      if (!q.heat) return null
      const root = el('div', at('heats'), '', { class: 'bnheat' }),
        view = heatView(el('div', root, '', { class: 'bnheat-main' }), root, q.heat, pointed(q.heat))
      root.dataset.ready = ''
      fixedViews.push({ axis: q.heat, mark: view.mark })
      return { root, ...view }
    })
  let layer = 0, tab = heats.findIndex(Boolean), turn = 0

  const list = nameList(side, page.layers.map(l => l.name), i => choose(i)),
    order = el('select', el('label', side, 'order '))
  const most = Math.max(...page.layers.map(l => l.moved)) || 1
  list.options.forEach((o, i) => {
    const m = page.layers[i].moved
    if (m === null) return
    o.style.setProperty('--moved', m / most)
    el('span', o, number(m * 100, { maximumSignificantDigits: 2 }) + '\u2009%')
  })
  for (const [v, t] of [['', 'of the network'], ['moved', 'changed most first']]) el('option', order, t, { value: v })
  order.onchange = () => {
    const moved = i => page.layers[i].moved ?? -1,
      by = [...page.layers.keys()]
    if (order.value) by.sort((a, b) => moved(b) - moved(a))
    for (const i of by) list.list.append(list.options[i])
  }
  order.parentNode.hidden = page.layers.every(l => l.moved === null)
  const same = checkbox(side, 'same colours for all layers', () => heats.forEach(h => h?.share(same.checked)))

  const tabs = page.quantities.map((q, k) => {
    const label = el('label', at('tabs')),
      radio = el('input', label, '', { type: 'radio', name: 'quantity' })
    label.append(q.name)
    radio.onchange = () => { tab = k; showHeat() }
    return radio
  })
  at('tabs').hidden = tabs.length < 2

  const showHeat = () => {
    const of = page.layers[layer].of,
      shown = of[tab] !== null && heats[tab] ? tab : of.findIndex((i, k) => i !== null && heats[k])
    tabs.forEach((t, k) => { t.checked = k == shown; t.disabled = of[k] === null || !heats[k] })
    heats.forEach((h, k) => { if (h) h.root.hidden = k != shown })
    heats[shown]?.show(of[shown])
  }
  const showSeries = async mine => {
    const of = page.layers[layer].of,
      ready = await Promise.all(page.quantities.map((q, k) => q.heat && of[k] !== null ? unpackFloats(q.values[of[k]]) : null))
    if (mine != turn) return // the reader has chosen another layer meanwhile
    series.forEach(s => s.end())
    series = page.quantities.flatMap((q, k) => ready[k] ? lines(ready[k], q.heat, q.series.length).map((l, i) => {
      l.colour = `var(--q${q.colour})`
      return chart(at('series'), q.heat, { title: q.series[i].title, log: q.series[i].log, lines: [l], against: 'step' }, pointed(q.heat), c => valueOf(q.heat, l, c))
    }) : [])
    mark()
    at('layer').dataset.layer = layer
  }
  const choose = i => {
    layer = i
    list.select(i)
    const o = list.options[i],
      box = list.list,
      y = o.offsetTop - box.offsetTop
    if (y < box.scrollTop || y + o.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = y - box.clientHeight / 2
    at('layer-name').textContent = page.layers[i].name
    showHeat()
    return showSeries(++turn)
  }
  document.addEventListener('click', e => {
    const a = e.target.closest('[data-go-layer], [data-go-step]')
    if (!a) return
    if (a.dataset.goQuantity) tab = +a.dataset.goQuantity
    if (a.dataset.goLayer) choose(+a.dataset.goLayer)
    if (a.dataset.goStep) {
      step = +a.dataset.goStep
      const axis = page.losses.axis
      when.textContent = axis ? axis.where[columnOf(axis, step)] : 'step ' + number(step)
      mark()
    }
  })
  if (page.layers.length) choose(0)
}

document.addEventListener('keydown', e => { if (e.key == 'Escape') { step = null; when.textContent = ''; mark() } })
drawLosses().then(drawRates).then(() => { document.body.dataset.ready = '' })
if (at('layer')) drawLayers()
