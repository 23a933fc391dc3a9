// A classic script in the head, so that the page never shows in the wrong theme first.
try {
  const theme = JSON.parse(localStorage.getItem("fewstep.theme"));
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be blocked: the system's theme it is.
}
