// The component: list of layers and picture. `start` fills one element of the class bnheat.

const start = root => {
  const json = root.querySelector('script[type="application/json"]')
  if (!json) return
  root.dataset.ready = ''
  const d = JSON.parse(json.textContent),
    box = (into, name) => el('div', into, '', { class: 'bnheat-' + name })
  if (d.title) box(root, 'title').textContent = d.title
  const body = box(root, 'body'),
    side = box(body, 'side'),
    list = nameList(side, d.layers.map(l => l.name), i => choose(i)),
    view = heatView(box(body, 'main'), root, d),
    same = checkbox(side, 'same colours for all layers', () => view.share(same.checked))
  const choose = i => { list.select(i); return view.show(i) }
  side.hidden = d.layers.length < 2
  choose(0)
}
