"""Fine-tune EVE: `python launcher/finetune.py --task vqa --init exports/demo --output_dir runs/vqa`.

    --task vqa         answers to questions about an image
    --task nlvr        statements about two images, or one: true or false
    --task retrieval   images by caption, captions by image

`--init` is an export, a run, a checkpoint, a fine-tuned model, a file of released weights (then `--model` names its
preset), or none. `--data` is `scenes` (generated, the default), `scenes:hard`, or files in one of the
known formats.
Also under deepspeed, torchrun, srun and mpirun.
"""

import sys
from pathlib import Path

# A multi-node `deepspeed` puts the repository root on the path, where the folder `kernels` hides a package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parents[1]]

import argparse
import json
from typing import Any

from eve_ds.config import Config, ConfigError
from eve_ds.distributed import get_logger
from eve_ds.launch_environment import LaunchError

EXIT_CODES = """exit codes:
  0  trained, saved and evaluated
  2  bad input: settings, data, weights or launch that cannot be used
  3  a loss or gradient norm that is not finite
  4  SIGTERM or SIGUSR1 to any rank: saved at the next step and stopped; the same command goes on from there
  5  checkpoints cannot be written
"""
EXIT_BAD_INPUT, EXIT_NONFINITE, EXIT_STOPPED, EXIT_NOT_SAVED = 2, 3, 4, 5


def main() -> int:
    """Parse the command line and fine-tune; see EXIT_CODES."""
    arguments = build_parser().parse_args()
    get_logger()  # shows what reading the configuration has to say
    try:
        config = read_config(arguments)
        deepspeed_config = _read_json(arguments.deepspeed_config)
        from eve_ds.checkpoint.commit import SaveError
        from eve_ds.checkpoint.files import CheckpointError
        from eve_ds.data.sources import UnusableData
        from eve_ds.ops.build import OpsBuildError
        from eve_ds.training.finetune import finetune
        from eve_ds.training.nonfinite import NonFiniteError

        try:
            summary = finetune(config, deepspeed_config)
        except (UnusableData, OpsBuildError, CheckpointError) as error:
            get_logger().error("%s", error)
            return EXIT_BAD_INPUT
        except NonFiniteError as error:
            get_logger().error("%s", error)
            return EXIT_NONFINITE
        except SaveError as error:
            get_logger().error("%s", error)
            return EXIT_NOT_SAVED
    except (ConfigError, LaunchError) as error:
        get_logger().error("%s", error)
        return EXIT_BAD_INPUT
    get_logger().info(
        "%s: %d steps, %d samples in %.1f s of training, model %s",
        "stopped by a signal, the same command goes on" if summary.stopped else "done",
        summary.steps,
        summary.samples,
        summary.train_seconds,
        "not yet saved" if summary.stopped else summary.model,
    )
    return EXIT_STOPPED if summary.stopped else 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=["vqa", "nlvr", "retrieval"])
    parser.add_argument("--init", required=True, help="where the backbone comes from, or none")
    parser.add_argument("--model", default="eve_tiny", help="preset of the model where --init does not say one")
    parser.add_argument("--config", help="recipe: a preset or a YAML file (default: that of scenes)")
    parser.add_argument("--data", nargs="+", metavar="DATA", help="scenes, scenes:hard, or annotation files")
    parser.add_argument("--val_data", nargs="+", metavar="DATA", help="the same for the evaluation")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that image names are relative to")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON; without it ZeRO 1")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides such as train.seed=1"
    )
    parser.add_argument("--output_dir", help="short for --set train.output_dir=...")
    parser.add_argument("--max_steps", type=int, help="short for --set train.max_steps=...")
    parser.add_argument("--max_seconds", type=float, help="short for --set train.max_seconds=...")
    parser.add_argument("--local_rank", type=int, help="passed by `deepspeed`; the environment says the same")
    return parser


def read_config(arguments: argparse.Namespace) -> Config:
    """The recipe over the model that `--init` names, under what the command line says."""
    from eve_ds.tasks.recipes import task_config

    short = ("output_dir", "max_steps", "max_seconds")
    given = [f"train.{name}={getattr(arguments, name)}" for name in short if getattr(arguments, name) is not None]
    return task_config(
        arguments.task,
        init=None if arguments.init == "none" else Path(arguments.init),
        model=arguments.model,
        recipe=arguments.config,
        train_data=arguments.data,
        val_data=arguments.val_data,
        images=arguments.images,
        overrides=[*arguments.set, *given],
    )


def _read_json(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--deepspeed_config {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"--deepspeed_config {path} is not JSON: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
