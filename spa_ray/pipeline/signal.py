"""The judge's signal during a run: computed once from the first committed episodes, told with its advice and written.

`SignalWatch` wraps a generation's progress callback. It reads at most SAMPLE committed episodes (and the files that
hold them) on a thread of its own, so generation does not wait for it. A resumed run finds the file and leaves it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.config.models import Config
from spa_ray.data.episodes import READ_OPTIONS, UNSOUND, unreadable
from spa_ray.data.schemas import EPISODES
from spa_ray.errors import InputError
from spa_ray.evaluation.signal import judge_signal
from spa_ray.storage.files import AnyPath, arrow_filesystem, is_file, parquet_sizes, write_json

FILE = "signal.json"
SAMPLE = 64  # prompts
Update = Callable[[Mapping[str, Any]], None]


class SignalWatch:
    """Passes progress on to `count`; at SAMPLE finished prompts it computes the signal, and `finish` does so at the end
    where there were fewer."""

    def __init__(
        self,
        config: Config,
        episodes: AnyPath,
        *,
        count: Update,
        say: Callable[[str], None],
        arms: Mapping[str, Config] | None = None,
    ) -> None:
        """`arms`: all arms that use the episodes, where there are several."""
        self._config, self._episodes, self._count, self._say = config, episodes, count, say
        self._arms = arms
        self._file = episodes.parent / FILE
        self._done = is_file(self._file)
        self._thread: threading.Thread | None = None
        self._tried = 0  # finished prompts when it was last looked

    def __call__(self, update: Mapping[str, Any]) -> None:
        self._count(update)
        busy = self._thread is not None and self._thread.is_alive()
        done = int(update["done"])
        if self._done or busy or done < SAMPLE or done == self._tried:
            return
        self._tried = done
        self._thread = threading.Thread(target=self._early, args=(int(update["total"]),), daemon=True)
        self._thread.start()

    def finish(self, total: int) -> None:
        """After the last episode. Raises: as reading and writing the run folder do."""
        if self._thread is not None:
            self._thread.join()
        if not self._done:
            self._tell(read_sample(self._episodes, whole=True), total)

    def _early(self, total: int) -> None:
        """While blocks are being written. What fails here is done again, and told, by `finish`."""
        try:
            sample = read_sample(self._episodes, whole=False)
            if sample.num_rows >= SAMPLE:
                self._tell(sample, total)
        except (OSError, pa.ArrowException, InputError):
            return

    def _tell(self, sample: pa.Table, total: int) -> None:
        if not sample.num_rows:
            return
        signal = judge_signal(sample, self._config, prompts=total, arms=self._arms)
        write_json(self._file, signal)
        self._done = True
        for line in signal_lines(signal):
            self._say(line)


def read_sample(episodes: AnyPath, *, whole: bool) -> pa.Table:
    """The first SAMPLE prompts among the files of a folder of episodes, file by file.

    Without `whole`, files that cannot be read are passed over: one that is being written has no end yet. With it they
    are an error. Raises: InputError naming such a file.
    """
    held: list[pa.Table] = []
    seen: set[str] = set()
    for table in _tables(episodes, whole=whole):
        fresh = [name not in seen for name in table["prompt_id"].to_pylist()]
        seen.update(table["prompt_id"].to_pylist())
        held.append(table.filter(pa.array(fresh)))
        if len(seen) >= SAMPLE:
            break
    return pa.concat_tables(held).slice(0, SAMPLE) if held else EPISODES.empty_table()


def _tables(episodes: AnyPath, *, whole: bool) -> Iterator[pa.Table]:
    filesystem, _ = arrow_filesystem(episodes)
    for file in sorted(parquet_sizes(episodes), reverse=True):  # a later attempt's rows come first
        try:
            with pq.ParquetFile(file, filesystem=filesystem, **READ_OPTIONS) as opened:
                table = opened.read(columns=EPISODES.names).replace_schema_metadata(None)
        except UNSOUND as e:
            if whole:
                raise unreadable(file) from e
            continue
        yield table.cast(EPISODES)


def signal_lines(signal: Mapping[str, Any]) -> list[str]:
    """The signal for a terminal: a line for each objective, two for what is kept and what to expect (two for each arm
    where arms differ in it), and one for each advice."""
    lines = [f"signal     of {signal['prompts']} prompts"]
    for name, found in signal["objectives"].items():
        bars = " ".join(f"{mark}:{count}" for mark, count in found["histogram"].items() if count)
        facts = {
            "at the top": f"{found['at_high'][0]:.0%}",
            "between answers": _number(found["between_var"]),
            "between draws": _number(found["within_var"]),
            "off scale": None if found["off_scale"] is None else f"{found['off_scale']:.0%}",
            "unread": f"{found['parse_failures'][0]:.0%}" if found["parse_failures"][0] else None,
        }
        told = "  ".join(f"{what} {value}" for what, value in facts.items() if value is not None)
        lines.append(f"signal     {name}: ratings {bars or 'none'}  {told}")
    tie = f"  all answers tie {signal['all_tie'][0]:.0%}"
    for names, found in _by_arms(signal):
        kept = "  ".join(f"{name} {share[0]:.0%}" for name, share in found["kept"].items())
        lines.append(f"signal     {names}kept: {kept}{tie}")
        steps = f"optimizer steps {_range(found['steps'])}"
        lines.append(f"signal     {names}to expect: pairs {_range(found['pairs'])}  {steps}")
        tie = ""
    for advice in signal["advice"]:
        change = f"; try {advice['change']}" if advice["change"] else ""
        lines.append(f"warning: {advice['code']}: {advice['text']}{change}")
    return lines


def _by_arms(signal: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What is kept and to be expected, once for all arms that are alike in it, and their names where they are not."""
    groups: dict[str, list[str]] = {}
    for name, found in signal.get("arms", {}).items():
        groups.setdefault(json.dumps(found), []).append(name)
    if len(groups) < 2:
        yield "", signal
        return
    for text, names in groups.items():
        yield f"arm{'s' * (len(names) > 1)} {', '.join(names)}: ", json.loads(text)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _range(triple: list[float]) -> str:
    mean, low, high = (round(x) for x in triple)
    return f"{mean:,}" if low == high else f"{mean:,} ({low:,} to {high:,})"
