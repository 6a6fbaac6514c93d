// One code or expert: its load over the steps, and what it takes of the probe.

import { chart } from './chart.js';
import { colourOfLine } from './colours.js';
import { element, nounOf, number, percent, whole } from './dom.js';

// answer: of the route "slot"; layer: of the route "run"
export function slotPanel(answer, layer, { marker, width, onClose }) {
  const noun = nounOf(layer.kind);
  const loads = answer.loads.filter((load) => load !== null);
  const plot = chart({
    title: `Load of ${answer.layer}, ${noun} ${answer.slot}`,
    x: { label: 'step', range: [answer.points[0], answer.points.at(-1)] },
    y: { label: 'load', range: [0, 1.05 * Math.max(1.5, ...loads)] },
    lines: [{
      name: `${noun} ${answer.slot}`, x: answer.points, y: answer.loads, colour: colourOfLine(0),
      strong: true,
    }],
    levels: [{ name: 'fair share', value: 1 }],
    marker,
  }, { width, height: 190 });
  const drawnAt = answer.last_drawn === null
    ? 'never drawn up to this step' : `last drawn at step ${whole(answer.last_drawn)}`;
  return [
    element(
      'div', { class: 'head' },
      element('h2', {}, `${answer.layer}, ${noun} ${answer.slot}`),
      element('button', { type: 'button', onclick: onClose, 'aria-label': 'Close this slot' }, '×'),
    ),
    element('p', { class: 'hint' }, `${drawnAt}; dashed: the fair share`),
    plot,
    ...takenOf(answer.probe, layer, noun),
  ];
}

function takenOf(probe, layer, noun) {
  if (!probe) {
    return [element('p', { class: 'hint' },
      'What it takes is not known: this run keeps no probe of these slots.')];
  }
  const even = layer.top_k / layer.slots;
  const when = probe.step === null ? 'at the last evaluation' : `at step ${whole(probe.step)}`;
  const share = percent(probe.tokens ? probe.taken / probe.tokens : 0);
  return [
    element('p', {}, `Of the probe it takes ${whole(probe.taken)} of ${whole(probe.tokens)} tokens `
      + `${when}: ${share}, where even use would be ${percent(even)}.`),
    element(
      'div', { class: 'taken' },
      ...table('Tokens it takes most', 'token', noun, probe.top.map((one) => ({
        ...one, name: one.text === null ? `id ${one.id}` : one.text, mono: true,
      }))),
      ...table('Documents they are from', 'domain', noun, probe.domains),
    ),
  ];
}

// Rows of a name and the share of its tokens that the slot takes.
function table(title, what, noun, rows) {
  if (!rows.length) return [];
  const head = [what, 'taken', 'of', `share to this ${noun}`];
  return [element(
    'table', {}, element('caption', {}, title),
    element('thead', {}, element('tr', {}, ...head.map((name) => element('th', { scope: 'col' }, name)))),
    element('tbody', {}, ...rows.map((row) => element(
      'tr', {},
      element('th', { scope: 'row', class: row.mono ? 'mono' : '' }, row.name),
      element('td', {}, whole(row.taken)),
      element('td', {}, whole(row.tokens)),
      element('td', {}, element('span', { class: 'share-bar' }, element('span', {
        style: `width:${(100 * row.taken) / Math.max(1, row.tokens)}%`,
      })), number((100 * row.taken) / Math.max(1, row.tokens)), '%'),
    ))),
  )];
}
