"""The flags of every verb of the command line."""

import argparse

from ibprune.errors import BadRecipe, did_you_mean

VERBS = {
    "prune": "make a trained model smaller and write a folder that loads (the default verb)",
    "plan": "say what can be cut and what a budget reaches, from the config alone",
    "train": "train a dense model, also from a config alone, and write a folder that loads",
    "compare": "show finished runs side by side, from their reports",
    "report": "draw the report.html of a finished run's folder again",
    "push": "send a folder that ibprune wrote to the Hub",
    "export": "write a pruned transformer for ONNX Runtime, OpenVINO or llama.cpp",
    "audit": "say what each layer of a dense and of a pruned model knows of its input and labels",
    "bench": "measure speed, memory and size of a dense and a pruned model side by side, and say why it is not more",
    "convert-legacy": "turn a checkpoint that an older tool pruned into a folder that loads",
    "doctor": "say what this machine has for a run, and what will be slow or is missing",
    "recipes": "list the recipes that come with ibprune, show one, or copy it to start from",
    "completion": "print what makes a shell complete verbs, flags and their values: bash, zsh or fish",
    "mi-benchmark": "compare information estimators on known distributions, or estimate a pair of arrays",
}


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and names the nearest flag."""

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments: "):
            found = message.removeprefix("unrecognized arguments: ").strip().partition(" ")[0]
            flags = [option for action in self._actions for option in action.option_strings]
            message = f"unknown flag or argument '{found}': {did_you_mean(found, flags)}"
        raise BadRecipe(message)


def _common(parser: Parser) -> None:
    _model(parser)
    parser.add_argument("--budget", help="share of the dense cost to keep, in (0, 1]; several: 0.5,0.3 or 0.1..0.9")
    parser.add_argument("--cost", help="what the budget counts: params (default), macs, memory or latency")
    parser.add_argument("--scope", help="model (default) or blocks, which leaves embeddings and heads out")
    kinds = "heads, kv_groups, experts, ffn, layers, hidden, embedding_rank, vocab; channels"
    parser.add_argument("--kinds", help=f"comma list: {kinds}")
    parser.add_argument("--round-to", type=int, help="wide axes become multiples of this (default 8; 256 for k-quants)")
    text = "cut only what plain transformers loads without code: the same widths in every layer"
    parser.add_argument("--vanilla", action="store_true", default=None, help=text)
    text = "cut the residual width in its principal directions (RMSNorm models with a head)"
    parser.add_argument("--rotate", action="store_true", default=None, help=text)


def _model(parser: Parser) -> None:
    parser.add_argument("--model", help="Hub id, local folder, or an alias such as bert-base or minilm")
    parser.add_argument("--image-size", type=int, help="pixels of a side of pictures (default: as the model was made)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _training(parser: Parser) -> None:
    add = parser.add_argument
    add("--augment", help="comma list of what is done to training pictures: flip,crop (default) or none")
    add("--seed", type=int, help="default 0")
    add("--batch-size", type=int, help="texts or pictures per batch, divided among the processes (default 32)")
    add("--num-processes", type=int, help="processes of this machine that train together (default 1)")
    add("--grad-accum", type=int, help="batches per step (default 1)")
    text = "run blocks again in the backward pass, for less memory"
    add("--gradient-checkpointing", action="store_true", default=None, help=text)
    add("--lr", type=float, help="peak learning rate (default: by objective)")
    add("--schedule", help="how it falls to 0: linear (default), cosine or uba (budget-aware)")
    add("--optimizer", help="adamw (default), or adamw-8bit: moments in a byte each (bitsandbytes)")
    add("--max-length", type=int, help="tokens per sequence (default: by objective)")
    text = "join texts by the end-of-text token and cut them into full windows (causal language models)"
    add("--packing", action="store_true", default=None, help=text)
    text = "read training rows of --data as they are needed: for more than memory or disk hold"
    add("--streaming", action="store_true", default=None, help=text)
    add("--shuffle-buffer", type=int, help="rows of a stream from which the next is drawn (default 4096)")
    add("--max-train-samples", type=int, help="rows to train on at most; of a stream the first")
    add("--max-train-tokens", type=int, help="tokens to train on at most (--packing)")
    add("--max-eval-samples", type=int, help="rows to hold out and judge on at most")
    add("--precision", help="auto (default), fp32 or bf16")
    add("--log-with", metavar="TRACKER", help="draw the run as it goes: tensorboard (in OUTPUT.logs), wandb, mlflow, …")


def _data(parser: Parser) -> None:
    parser.add_argument("--task", help="a GLUE task by name, such as sst2")
    parser.add_argument(
        "--data",
        help="csv, tsv, jsonl, parquet or txt file, a folder of them, a Hub data set, or 'prose'; "
        "for pictures a folder with a sub-folder per class, an npz file or a Hub data set",
    )
    parser.add_argument("--text-columns", help="comma list of the columns with the text")
    parser.add_argument("--label-column", help="the column with the label")


def _recipe(parser: Parser) -> None:
    parser.add_argument("--recipe", help="YAML file with these flags as keys; flags override it")
    text = "a key of the recipe and its value, as in YAML: kinds=[heads, ffn], lr=null; may be given several times"
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help=text)


def _phases(parser: Parser) -> None:
    add = parser.add_argument
    add("--mode", help="full (default); fast: on 3 %% of the data; faster: that, and weights stay as they are")
    scores = "vib (default), gradual, fisher, kwon, obs, taylor, flap, activation, magnitude or random"
    add("--score", help=f"what ranks the units: {scores}")
    starts = "flap (default of causal language models), fisher (of others), obs, taylor, activation, magnitude, random"
    add("--start", help=f"the ranking that learned masks start from: {starts}")
    add("--reconstruct", action="store_true", default=None, help="refit by least squares what reads the cut units")
    add("--shares", help="how the cut is shared between kinds: probe (default), cost or equal")
    add("--finetune-steps", type=int, help="steps to train the dense model first (default: if its head is new)")
    add("--mask-steps", type=int, help="steps of scores vib and gradual (default: by objective)")
    add("--recover-steps", type=int, help="steps of recovery (default: by objective)")
    add("--recovery", help="what trains in the recovery: full (default), or lora: adapters that the weights take up")
    add("--lora-rank", type=int, help="rank of the adapters (default 16)")
    add("--lora-alpha", type=float, help="over the rank, their scale (default: twice the rank)")
    text = "judge the recovery so often on training rows held back, and keep the best weights (default: the last ones)"
    add("--eval-every", type=int, metavar="STEPS", help=text)
    add("--patience", type=int, metavar="N", help="end the recovery after N such looks without a lower loss")
    add("--probe-steps", type=int, help="steps before candidate cuts are compared (default: recovery / 8)")
    add("--distill", help="what is learned from the dense model: logits (default), hidden or relations (these and its "
        "blocks' states, or how they relate tokens), or none")  # fmt: skip
    text = "hold the dense model in 4 bits (bitsandbytes) while units are scored or masks learned (--mode faster); the "
    add("--load-in-4bit", action="store_true", default=None, help=text + "weights that stay are read from the source")
    add("--load-in-8bit", action="store_true", default=None, help="the same in 8 bits")
    add("--no-distill", dest="distill", action="store_const", const="none", help="the same as --distill none")
    add("--divergence", help="how logits are compared: forward KL (default), reverse or balanced")


def _saving(parser: Parser) -> None:
    add = parser.add_argument
    add("--resume", action="store_true", default=None, help="go on with a run that was cut short, from OUTPUT.partial")
    add("--save-every", type=float, help="minutes between two saves of the run's state (default 10)")
    add("--keep-last", type=int, help="saves of a phase of training that are kept in case one is damaged (default 2)")


def _pushing(parser: Parser) -> None:
    add = parser.add_argument
    add("--private", action="store_true", default=None, help="make the Hub repo a private one")
    add("--revision", help="branch of the Hub repo (default: main)")
    add("--commit-message", help="of the commit on the Hub")


def prune_parser() -> Parser:
    parser = Parser(prog="ibprune", description="Prune a trained model to a budget.", allow_abbrev=False)
    _common(parser)
    add = parser.add_argument
    _recipe(parser)
    _data(parser)
    add("--at-least", metavar="METRIC=VALUE", help="the smallest model that keeps accuracy=0.88, or accuracy=99%% of "
        "the dense model's (perplexity: at most); --budget is then the least to try (default 0.1)")  # fmt: skip
    add("--latency-table", metavar="FILE", help="a latency.json measured on this device before (--cost latency)")
    add("--output", help="folder to write (default: pruned)")
    _training(parser)
    _phases(parser)
    _saving(parser)
    add("--push-to-hub", metavar="REPO", help="send the folder to this Hub repo, such as user/model, at the end")
    _pushing(parser)
    add("--no-audit", dest="audit", action="store_false", default=None, help="skip the information audit")
    add("--quiet", action="store_true", help="no progress, only the closing table")
    add("--json", action="store_true", help="print the report as JSON instead of the table")
    parser.epilog = "Verbs: " + "; ".join(f"{verb}: {text}" for verb, text in VERBS.items()) + "."
    return parser


def plan_parser() -> Parser:
    parser = Parser(prog="ibprune plan", description=VERBS["plan"].capitalize() + ".", allow_abbrev=False)
    _common(parser)
    _recipe(parser)
    _data(parser)
    add = parser.add_argument
    text = "load the model, and say how the loss on a few batches rises when this share (default 0.5) of the units of "
    add("--sensitivity", nargs="?", type=float, const=0.5, metavar="SHARE", help=text + "one place alone is closed")
    add("--latency-table", metavar="FILE", help="a latency.json that a run left: say what a forward pass takes, too")
    add("--estimate", action="store_true", help="say how much memory and time the run takes too")
    add("--flops-per-second", type=float, metavar="RATE", help="the best of the GPU that will run it, such as 400e12 "
        "(default: measured on this device)")  # fmt: skip
    add("--utilisation", type=float, help="share of that rate which training reaches (default 0.4)")
    _training(parser)
    _phases(parser)
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def train_parser() -> Parser:
    parser = Parser(prog="ibprune train", description=VERBS["train"].capitalize() + ".", allow_abbrev=False)
    _model(parser)
    _data(parser)
    _training(parser)
    parser.add_argument("--output", help="folder to write (default: trained)")
    parser.add_argument("--finetune-steps", type=int, help="steps to train (default: one epoch, at most 2000)")
    _saving(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress, only the closing line")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the line")
    return parser


def compare_parser() -> Parser:
    parser = Parser(prog="ibprune compare", description=VERBS["compare"].capitalize() + ".", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", help="what runs wrote; one of several budgets stands for those inside")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def report_parser() -> Parser:
    parser = Parser(prog="ibprune report", description=VERBS["report"].capitalize() + ".", allow_abbrev=False)
    parser.add_argument("folder", help="what a run wrote; one of several budgets is drawn with the folders inside")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def push_parser() -> Parser:
    parser = Parser(prog="ibprune push", description=VERBS["push"].capitalize() + ".", allow_abbrev=False)
    parser.add_argument("folder", help="what ibprune wrote")
    parser.add_argument("repo", help="user/model")
    _pushing(parser)
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace what the repo holds")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def export_parser() -> Parser:
    parser = Parser(prog="ibprune export", description=VERBS["export"].capitalize() + ".", allow_abbrev=False)
    add = parser.add_argument
    add("folder", help="what ibprune wrote for a transformer or a CNN of transformers")
    add("--to", required=True, help="onnx, openvino or gguf (causal language models of LLaMA's kind)")
    add("--output", help="what to write (default: the folder's name with -onnx, -openvino or .gguf)")
    add("--dtype", help="of a GGUF's matrices: f32 or f16 (default: as the folder's)")
    add("--json", action="store_true", help="print the result as JSON instead of lines")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def audit_parser() -> Parser:
    parser = Parser(prog="ibprune audit", description=VERBS["audit"].capitalize() + ".", allow_abbrev=False)
    add = parser.add_argument
    add("dense", help="Hub id, folder or alias of the dense model")
    add("pruned", help="the pruned folder, or any checkpoint of the same family")
    _data(parser)
    add("--image-size", type=int, help="pixels of a side, for a CNN that brings no image processor")
    add("--layers", help="comma list of blocks or modules (default: every block; of a CNN about a dozen stages)")
    add("--pooling", help="mean, cls, last or random (default: last for decoders, mean otherwise)")
    add("--probe", choices=("logistic", "mlp"), help="predictors of the V-information (default logistic)")
    add("--tokens", type=int, help="ask for the N most frequent tokens too, current and next (default: not)")
    add("--pair", action="store_true", default=None, help="also estimate I(dense layer; pruned layer)")
    add("--max-inputs", type=int, help="at most so many distinct texts or pictures (default 2400)")
    add("--max-length", type=int, help="tokens read of a text (default 128)")
    add("--seed", type=int, help="default 0")
    add("--output", help="folder for audit.json and the plots (default: nothing is written)")
    add("--quiet", action="store_true", help="no progress, only the table")
    add("--json", action="store_true", help="print the audit as JSON instead of the table")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def bench_parser() -> Parser:
    parser = Parser(prog="ibprune bench", description=VERBS["bench"].capitalize() + ".", allow_abbrev=False)
    add = parser.add_argument
    add("dense", help="Hub id, folder or alias of the dense model")
    add("pruned", help="the pruned folder, or any checkpoint of the same family")
    add("--batches", type=_numbers, help="comma list of inputs at a time (default 1,8,32)")
    add("--lengths", type=_numbers, help="comma list of tokens of an input (default 32,128)")
    add("--runtimes", type=_names, help="comma list of eager (default) and compile")
    add("--precision", help="fp32 (default) or bf16")
    add("--rounds", type=int, help="timed runs of each model (default 15)")
    add("--image-size", type=int, help="pixels of a side, for a CNN that brings no image processor")
    add("--output", help="a JSON file for the result (default: none is written)")
    add("--quiet", action="store_true", help="no progress, only the table")
    add("--json", action="store_true", help="print the result as JSON instead of the table")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def legacy_parser() -> Parser:
    parser = Parser(prog="ibprune convert-legacy", description=VERBS["convert-legacy"].capitalize() + ".",
                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("source", help="a folder with a config.json and a state dict")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the closing line")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a comma list of whole numbers, found '{text}'") from None


def doctor_parser() -> Parser:
    parser = Parser(prog="ibprune doctor", description=VERBS["doctor"].capitalize() + ".", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def recipes_parser() -> Parser:
    parser = Parser(prog="ibprune recipes", description=VERBS["recipes"].capitalize() + ".", allow_abbrev=False)
    add = parser.add_argument
    add("action", nargs="?", default="list", choices=("list", "show", "copy", "schema"),
        help="schema: the JSON Schema of a recipe, for editors")  # fmt: skip
    add("name", nargs="?", help="of a recipe, for show and copy")
    add("target", nargs="?", default=".", help="file or folder to copy to (default: here)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def completion_parser() -> Parser:
    parser = Parser(prog="ibprune completion", description=VERBS["completion"].capitalize() + ".", allow_abbrev=False)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose script is printed")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.epilog = (
        "Into a file that the shell reads: ~/.local/share/bash-completion/completions/ibprune, _ibprune in a folder of "
        "zsh's fpath, or ~/.config/fish/completions/ibprune.fish."
    )
    return parser


def mi_parser() -> Parser:
    parser = Parser(prog="ibprune mi-benchmark", description=VERBS["mi-benchmark"].capitalize() + ".",
                     allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("--tasks", help="comma list of tasks, or of parts of their names (default: all 40)")
    add("--estimators", help="comma list (default: pairwise,ksg,ksg-copula,gaussian,gaussian-copula,infonce)")
    add("--n", type=int, default=10_000, help="samples (default 10000)")
    add("--seeds", default="0", help="comma list (default 0)")
    add("--xy", help="an npz file with the arrays x and y; integer y means labels")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser
