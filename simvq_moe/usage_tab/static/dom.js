// Elements, made without HTML: a name from a run folder only ever becomes text.

const SVG = 'http://www.w3.org/2000/svg';

export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? '' : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// A number as it is shown: shares as percent, everything else to three digits.
export function percent(share) {
  if (share === null || share === undefined) return '–';
  const text = (100 * share).toFixed(1);
  return `${text.endsWith('.0') ? text.slice(0, -2) : text}%`;
}

export function number(value) {
  if (value === null || value === undefined) return '–';
  if (Number.isInteger(value)) return whole(value);
  return Math.abs(value) >= 100 ? whole(Math.round(value)) : String(Number(value.toPrecision(3)));
}

export function whole(value) {
  return value.toLocaleString('en-US');
}

export function plural(count, noun) {
  return `${whole(count)} ${noun}${count === 1 ? '' : 's'}`;
}

const NOUNS = { codes: 'code', experts: 'expert', kept: 'expert' };

export function nounOf(kind) {
  return NOUNS[kind];
}
