// Replaces the page with the newest one, unless its tab is hidden or the pointer is on a curve.
const REFRESH_MS = 2000;
const refresh = async () => {
  if (!document.hidden && !document.querySelector("svg.plot:hover")) {
    try {
      const answer = await fetch(location.href);
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of ["main", "footer"]) document.querySelector(part).replaceWith(page.querySelector(part));
      document.title = page.title;
      readCurves();
      document.body.classList.remove("lost");
    } catch {
      document.body.classList.toggle("lost", !document.querySelector("main[data-ended]"));  // nobody answers after the end
    }
  }
  setTimeout(refresh, REFRESH_MS);
};
setTimeout(refresh, REFRESH_MS);
