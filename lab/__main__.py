"""`python -m lab up|status|down|seed|copy|write`: a lab on this machine."""

import argparse
import sys
from functools import partial
from pathlib import Path

from lab.environment import Lab, default_state, tear_down
from lab.process import exit_code
from lab.writer import Writer


def main() -> int:
    """Run the command line; exit code 1: it failed, 2: this machine cannot run it, 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    parser.add_argument("--state", type=Path, default=default_state(), help="the lab's folder (default %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start everything")
    up.add_argument("--airflow", action="store_true", help="with Airflow")
    up.add_argument("--heartbeat", type=int, default=12, metavar="S", help="of the mounts, seconds (default 12)")
    commands.add_parser("status", help="what runs and where")
    commands.add_parser("down", help="stop everything and remove the folder")
    seed = commands.add_parser("seed", help="write files through the first mount")
    seed.add_argument("--files", type=int, default=300, help="how many (default 300)")
    commands.add_parser("copy", help="copy the volume's objects to the new store")
    write = commands.add_parser("write", help="write into the first mount until `down` or `stop-writing`")
    write.add_argument("--rate", type=float, default=5.0, help="files a second at most (default 5)")
    commands.add_parser("stop-writing", help="stop the writer and say what it did")
    arguments = parser.parse_args()
    return exit_code(partial(_run, arguments))


def _run(arguments: argparse.Namespace) -> int:
    state: Path = arguments.state
    if arguments.command == "up":
        print_status(Lab.up(state, airflow=arguments.airflow, heartbeat_s=arguments.heartbeat))
        return 0
    if arguments.command == "down":
        tear_down(state, remove=True)
        print("stopped" if state.exists() else f"stopped; {state} is gone")
        return 0
    lab = Lab.load(state)
    match arguments.command:
        case "status":
            print_status(lab)
        case "seed":
            print(f"written; manifest {lab.seed(arguments.files)}")
        case "copy":
            copied = lab.copy_to_new_store()
            print(f"found {copied.found} objects, copied {copied.copied}")
        case "write":
            writer = Writer.start(lab.state, lab.mounts()[0] / "app", rate=arguments.rate)
            print(f"writing into {writer.folder}; manifest {writer.manifest}")
        case "stop-writing":
            summary = Writer(lab.state, "writer", lab.mounts()[0] / "app", lab.state / "writer.manifest.jsonl").stop()
            errors = f"write errors {len(summary.write_errors)}, read errors {len(summary.read_errors)}"
            print(f"written {summary.written}, deleted {summary.deleted}, read {summary.read}, {errors}")
    return 0


def print_status(lab: Lab) -> None:
    """Print what runs and where."""
    for component, state, detail in lab.status():
        print(f"{component:<12} {state:<8} {detail}")
    if lab.airflow:
        print(f"log in to {lab.airflow.url} as {lab.airflow.user} with the password {lab.airflow.password}")


if __name__ == "__main__":
    sys.exit(main())
