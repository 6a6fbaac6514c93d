// Light or dark as TensorBoard is, whose own default is what the browser prefers.

export function followTheme() {
  const prefers = window.matchMedia('(prefers-color-scheme: dark)');
  const host = window.parent === window ? null : window.parent.document.body;
  const apply = () => {
    const dark = host ? host.classList.contains('dark-mode') : prefers.matches;
    document.documentElement.dataset.theme = dark ? 'dark' : 'light';
  };
  apply();
  prefers.addEventListener('change', apply);
  if (host) new MutationObserver(apply).observe(host, { attributeFilter: ['class'] });
}
