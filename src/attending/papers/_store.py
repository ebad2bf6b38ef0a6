"""Finished runs on disk, one file each, so that what was computed once is not computed again."""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

from attending.papers._json import to_text, write_whole
from attending.papers._record import Scale
from attending.papers._reproduction import Reproduction


@dataclass(frozen=True)
class StoredRun:
    """A finished run: its result, the fingerprint of the experiment, and when it ended (UTC)."""

    fingerprint: str
    finished: str
    reproduction: Reproduction


@dataclass(frozen=True)
class Store:
    """The folder `out_dir`: `runs/<slug>/<scale>-<seed>.json`, `<slug>.json` and `<slug>.png`."""

    out_dir: Path

    def run_path(self, slug: str, scale: Scale, seed: int) -> Path:
        """Where a finished run lies."""
        return self.out_dir / "runs" / slug / f"{scale}-{seed}.json"

    def work_dir(self, slug: str, scale: Scale, seed: int, fingerprint: str) -> Path:
        """The run's own folder, for checkpoints. A changed experiment gets another one."""
        return self.out_dir / "runs" / slug / f"{scale}-{seed}.{fingerprint}"

    def summary_path(self, slug: str) -> Path:
        """Where the summary of all seeds lies."""
        return self.out_dir / f"{slug}.json"

    def picture_path(self, slug: str) -> Path:
        """Where the picture lies."""
        return self.out_dir / f"{slug}.png"

    def load(self, slug: str, scale: Scale, seed: int, fingerprint: str) -> StoredRun | None:
        """The stored run of the experiment with that fingerprint, None if there is none."""
        path = self.run_path(slug, scale, seed)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["fingerprint"] != fingerprint:
                return None
            found = Reproduction.from_data(data["reproduction"])
            return StoredRun(data["fingerprint"], data["finished"], found)
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError):  # of another version, or edited: run it again
            return None

    def save(self, reproduction: Reproduction, fingerprint: str) -> StoredRun:
        """Write a finished run; it is there whole, or not at all.

        The fingerprint is that of the experiment as it was started: its source may have been edited
        since.
        """
        run = StoredRun(
            fingerprint=fingerprint,
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            reproduction=reproduction,
        )
        data = {
            "fingerprint": run.fingerprint,
            "finished": run.finished,
            "reproduction": reproduction.to_data(),
        }
        path = self.run_path(reproduction.slug, reproduction.scale, reproduction.seed)
        write_whole(path, to_text(data))
        return run
