// Questions to the plug-in. Answers about a window are kept as long as the run's files stay.

const KEPT_WINDOWS = 400;

export async function ask(route, question = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(question)) {
    for (const one of Array.isArray(value) ? value : [value]) query.append(name, one);
  }
  const answer = await fetch(`./${route}?${query}`);
  const body = await answer.json().catch(() => ({ error: `${answer.status} of TensorBoard` }));
  if (!answer.ok) throw new Error(body.error);
  return body;
}

const windows = new Map();

export function askWindow(run, counted, window) {
  const key = JSON.stringify([run.name, run.version, counted, window]);
  if (!windows.has(key)) {
    if (windows.size >= KEPT_WINDOWS) windows.delete(windows.keys().next().value);
    const answer = ask('window', { run: run.name, counted, window });
    answer.catch(() => windows.delete(key));
    windows.set(key, answer);
  }
  return windows.get(key);
}
