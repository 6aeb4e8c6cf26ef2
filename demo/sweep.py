"""Shows what learning rates do to the demo, and picks each method's best by held-out training problems.

    python demo/sweep.py outputs/demo/model/train/rates

Reads the run records in FOLDER/METHOD/RATE, prints eval_score and eval_loss of each, and links
FOLDER/METHOD/best to the rate with the highest score, at equal scores the lowest loss. The published
rate is shown and never picked: the published experiment found its place beside the best one.
The rates suit the demo's small model and say nothing about another.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import UserError, command_line, read_json

PUBLISHED_RATE = "1e-6"


@command_line
def main(argv=None):
    (folder,) = map(Path, sys.argv[1:] if argv is None else argv)
    for method, best in show(folder).items():
        link = folder / method / "best"
        link.unlink(missing_ok=True)
        link.symlink_to(best)


def show(folder):
    """Print the table of FOLDER; returns the best rate of each method."""
    found = {}
    print(f"{'method':<12}{'learning rate':>14}{'eval_score':>20}{'eval_loss':>12}")
    for method in sorted(path for path in folder.iterdir() if path.is_dir() and rates(path)):
        results = {rate: read_result(method / rate) for rate in sorted(rates(method), key=float)}
        own = {rate: result for rate, result in results.items() if rate != PUBLISHED_RATE}
        best = found[method.name] = max(own, key=lambda rate: (own[rate]["eval_score"], -own[rate]["eval_loss"]))
        for rate, result in results.items():
            score = f"{result['eval_score']:.1f} % ± {result['eval_score_stderr']:.1f}"
            mark = {best: "  best", PUBLISHED_RATE: "  published rate"}.get(rate, "")
            print(f"{method.name:<12}{rate:>14}{score:>20}{result['eval_loss']:>12.4f}{mark}")
    print("± is one standard error; the held-out problems come from the train split")
    return found


def rates(method):
    return [path.name for path in method.iterdir() if (path / "train.run.json").exists() and not path.is_symlink()]


def read_result(run):
    result = read_json(run / "train.run.json")["result"]
    if not result:
        raise UserError(f"{run}: not finished; python reproduce.py run rates --model-id demo/model goes on with it")
    return result


if __name__ == "__main__":
    sys.exit(main())
