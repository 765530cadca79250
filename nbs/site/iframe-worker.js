// A page opened from a folder may not start a worker from a file, and the search of the theme lives in one. Here a hidden frame takes its place:
// it runs the same script, `importScripts` becomes script tags, and messages travel between the two windows. Served pages keep the real worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.title = "search";
      frame.setAttribute("aria-hidden", "true");
      const load = `
        window.importScripts = (...all) => Promise.all(all.map(src => new Promise((done, fail) => {
          const tag = Object.assign(document.createElement("script"), {src: new URL(src, ${JSON.stringify(String(url))}), onload: done, onerror: fail});
          document.body.append(tag);
        })));
        window.postMessage = data => parent.dispatchEvent(new CustomEvent("gears-search", {detail: data}));`;
      frame.srcdoc = `<!doctype html><body><script>${load}<\/script><script src="${url}"><\/script></body>`;
      addEventListener("gears-search", event => {
        const message = new MessageEvent("message", {data: event.detail});
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      });
      frame.onload = () => {
        this.frame = frame;
        this.waiting.splice(0).forEach(data => this.postMessage(data));
      };
      document.body.append(frame);
    }
    postMessage(data) {
      if (this.frame) this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data}));
      else this.waiting.push(data);
    }
    terminate() { this.frame?.remove(); }
  };
}
