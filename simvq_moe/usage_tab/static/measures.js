// The measures that have charts, tiles at one step, and the table of dead and starved slots.

import { chart } from './chart.js';
import { colourOfLine } from './colours.js';
import { element, nounOf, number, percent, plural, whole } from './dom.js';

const shares = (values) => [Math.max(0, Math.min(0.95, ...values) - 0.02), 1];

export const MEASURES = [
  {
    name: 'used', label: 'used share', format: percent, range: shares,
    meaning: 'share of slots that were drawn at least once',
  },
  {
    name: 'entropy', label: 'entropy', format: number, range: shares,
    meaning: 'entropy of the slots’ shares over that of even use; 1 is even',
  },
  {
    name: 'max_vio', label: 'MaxVio', format: number,
    range: (values) => [0, 1.05 * Math.max(0.1, ...values)],
    meaning: 'draws of the most used slot over the mean, less 1; 0 is even',
  },
];

const KINDS = { experts: 'Experts', kept: 'Experts after the capacity', codes: 'Codes' };

export function titleOf(kind) {
  return KINDS[kind];
}

// Kinds of the layers in the order of their first layer, each with its layers.
export function byKind(layers) {
  const found = new Map();
  layers.forEach((layer, index) => {
    if (!found.has(layer.kind)) found.set(layer.kind, []);
    found.get(layer.kind).push({ ...layer, index });
  });
  return found;
}

function mean(values) {
  const there = values.filter((value) => value !== null && value !== undefined);
  return there.length ? there.reduce((sum, value) => sum + value, 0) / there.length : null;
}

// What all layers of a kind are at one step; rows: of the route "window".
export function tiles(kind, layers, rows) {
  const own = layers.map((layer) => rows[layer.index]);
  const slots = layers.reduce((sum, layer) => sum + layer.slots, 0);
  const counted = (name) => Math.round(
    layers.reduce((sum, layer, i) => sum + (own[i][name] ?? 0) * layer.slots, 0),
  );
  const tile = (label, value, note) => element(
    'div', { class: 'tile' },
    element('span', { class: 'tile-label' }, label),
    element('span', { class: 'tile-value' }, value),
    element('span', { class: 'tile-note' }, note),
  );
  return [
    ...MEASURES.map((measure) => {
      const even = mean(layers.map((layer) => layer.chance && layer.chance[measure.name]));
      return tile(
        measure.label, measure.format(mean(own.map((row) => row[measure.name]))),
        even === null ? '' : `chance ${measure.format(even)}`,
      );
    }),
    tile('dead', whole(counted('dead')), `of ${plural(slots, nounOf(kind))}`),
    tile('starved', whole(counted('starved')), 'below a tenth of the fair share'),
  ];
}

// Charts of all layers of a kind over steps; run: of the route "run".
export function overSteps(run, layers, { width, marker }) {
  const many = layers.length > 1;
  return MEASURES.map((measure) => {
    const lines = layers.map((layer, i) => ({
      name: layer.name, x: run.points, y: layer.measures[measure.name],
      colour: many ? 'var(--faint)' : colourOfLine(0), strong: !many, index: i,
    }));
    if (many) {
      lines.push({
        name: 'mean of layers', x: run.points, colour: colourOfLine(0), strong: true,
        y: run.points.map((_, i) => mean(layers.map((layer) => layer.measures[measure.name][i]))),
      });
    }
    const even = mean(layers.map((layer) => layer.chance && layer.chance[measure.name]));
    const values = lines.flatMap((line) => line.y).filter((value) => value !== null);
    return element(
      'figure', {},
      element('figcaption', { title: measure.meaning }, element('b', {}, measure.label),
        element('span', {}, measure.meaning)),
      chart({
        title: measure.label,
        x: { label: 'step', range: [run.points[0], run.points.at(-1)] },
        y: { label: '', range: measure.range([...values, ...(even === null ? [] : [even])]),
          format: measure.format },
        lines,
        levels: even === null ? [] : [{ name: 'chance', value: even }],
        marker,
      }, { width, height: 180 }),
    );
  });
}

// Dead and starved slots by name, and since which step.
export function sick(layers, rows, step) {
  const found = [];
  layers.forEach((layer, i) => {
    for (const state of ['dead', 'starved']) {
      for (const spell of rows[i][`${state}_slots`]) found.push({ layer, state, spell });
    }
  });
  if (!found.length) return element('p', { class: 'hint' }, 'None at this step.');
  const head = ['layer', 'state', 'since step', 'for steps', 'number', 'slots'];
  return element(
    'div', { class: 'table-scroll', tabindex: 0, role: 'region', 'aria-label': 'Dead and starved' },
    element(
      'table', { class: 'sick' },
      element('thead', {}, element('tr', {}, ...head.map((name) => element('th', { scope: 'col' }, name)))),
      element('tbody', {}, ...found.map(({ layer, state, spell }) => element(
        'tr', {},
        element('th', { scope: 'row' }, layer.name),
        element('td', {}, element('span', { class: `state ${state}` }, state)),
        element('td', {}, spell.since === null ? 'the start' : whole(spell.since)),
        element('td', {}, whole(step - (spell.since ?? 0))),
        element('td', {}, whole(spell.number)),
        element('td', { class: 'ids' }, spell.slots.join(', '),
          spell.more ? ` and ${plural(spell.more, 'range')} more` : ''),
      ))),
    ),
  );
}

// The counts of a step as a table, for readers of screens and for copying.
export function countsTable(layers, rows) {
  const cells = layers.filter((layer) => layer.cells);
  const slots = Math.max(...cells.map((layer) => layer.slots));
  const head = ['layer', ...Array.from({ length: slots }, (_, i) => String(i))];
  return element(
    'div', { class: 'table-scroll', tabindex: 0, role: 'region', 'aria-label': 'Counts' },
    element(
      'table', { class: 'counts' },
      element('thead', {}, element('tr', {}, ...head.map((name) => element('th', { scope: 'col' }, name)))),
      element('tbody', {}, ...cells.map((layer) => element(
        'tr', {}, element('th', { scope: 'row' }, layer.name),
        ...rows[layer.index].counts.map((count) => element('td', {}, String(count))),
      ))),
    ),
  );
}
