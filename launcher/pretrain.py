"""Pre-train EVE: `deepspeed launcher/pretrain.py --config eve_tiny --deepspeed_config ds_configs/zero1_ep2_cpu.json`.

Also under torchrun, srun, mpirun, or as plain `python` with one process.
"""

import sys
from pathlib import Path

# A multi-node `deepspeed` puts the repository root on the path, where the folder `kernels` hides a package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parents[1]]

import argparse
import json

from eve_ds.config import ConfigError, load_config
from eve_ds.distributed import get_logger
from eve_ds.launch_environment import LaunchError

EXIT_CODES = """exit codes:
  0  trained to the end
  2  bad input: settings, data or launch that cannot be used
  3  a loss or gradient norm that is not finite
  4  SIGTERM or SIGUSR1 to any rank: saved at the next step and stopped; the same command goes on from there
  5  checkpoints cannot be written
"""
EXIT_BAD_INPUT, EXIT_NONFINITE, EXIT_STOPPED, EXIT_NOT_SAVED = 2, 3, 4, 5


def main() -> int:
    """Parse the command line and train; see EXIT_CODES."""
    arguments = _parser().parse_args()
    get_logger()  # shows what reading the configuration has to say
    try:
        config = load_config(arguments.config, _overrides(arguments))
        deepspeed_config = _read_json(arguments.deepspeed_config)
        from eve_ds.checkpoint.commit import SaveError
        from eve_ds.data.sources import UnusableData
        from eve_ds.ops.build import OpsBuildError
        from eve_ds.training.nonfinite import NonFiniteError
        from eve_ds.training.pretrain import pretrain

        resume = arguments.resume if arguments.resume in {"auto", "none"} else Path(arguments.resume)
        try:
            summary = pretrain(config, deepspeed_config, resume)
        except (UnusableData, OpsBuildError) as error:
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
        "%s: %d steps, %d samples in %.1f s of training (%.1f samples/s), checkpoint %s",
        "stopped by a signal, the same command goes on" if summary.stopped else "done",
        summary.steps,
        summary.samples,
        summary.train_seconds,
        summary.samples_per_second,
        summary.checkpoint,
    )
    return EXIT_STOPPED if summary.stopped else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="eve_tiny", help="preset (eve_tiny, eve_base, eve_large) or YAML file")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON; without it ZeRO 0")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides such as train.seed=1"
    )
    parser.add_argument("--output_dir", help="short for --set train.output_dir=...")
    parser.add_argument("--max_steps", type=int, help="short for --set train.max_steps=...")
    parser.add_argument("--max_seconds", type=float, help="short for --set train.max_seconds=...")
    parser.add_argument(
        "--init", help="short for --set train.init=...: exported folder, checkpoint or run to start from"
    )
    parser.add_argument("--resume", default="auto", help="auto (default), none, or a checkpoint folder")
    parser.add_argument("--local_rank", type=int, help="passed by `deepspeed`; the environment says the same")
    return parser


def _overrides(arguments: argparse.Namespace) -> list[str]:
    short = ("output_dir", "max_steps", "max_seconds", "init")
    given = [f"train.{name}={getattr(arguments, name)}" for name in short if getattr(arguments, name) is not None]
    return [*arguments.set, *given]


def _read_json(path: str | None) -> dict | None:
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
