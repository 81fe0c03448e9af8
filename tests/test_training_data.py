"""From a pairs table to token rows: generated ids as they are, nothing cut, everything that is left out counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.config.training import train_section
from spa_ray.data.schemas import pairs_schema
from spa_ray.errors import InputError
from spa_ray.rollout.chat import Chat
from spa_ray.training.dataset import Selection, TokenizedPairs, read_sequences, select_pairs
from spa_ray.training.forward import collate_packed, collate_padded
from spa_ray.training.method import Example, Method, Read, Row, method_of
from spa_ray.training.tokenize import content_hash, tokenize_pairs
from tests.tiny_model import build_tiny_tokenizer
from tests.training_support import pair_rows, write_pairs


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tiny_tokenizer()


def tokenized(
    tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]], **settings: Any
) -> tuple[TokenizedPairs, dict[str, int]]:
    arguments = {"vocab_size": 265, "max_length": 128, "gap": "abs_sum", **settings}
    pairs = write_pairs(tmp_path / "pairs" / "part.parquet", rows)
    dropped = tokenize_pairs(pairs.parent, tmp_path / "tokens.arrow", Chat(tokenizer, model="tiny"), **arguments)
    return TokenizedPairs(tmp_path / "tokens.arrow"), dropped


def test_prompts_end_in_the_generation_header_and_responses_are_the_generated_ids(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = pair_rows(40)
    data, dropped = tokenized(tmp_path, tokenizer, rows)
    assert len(data) == 40
    assert dropped == {"too_long": 0, "identical": 0}
    for i, row in enumerate(sorted(rows, key=lambda r: r["pair_id"])):
        prompt = data.ids("prompt_ids", i)
        assert tokenizer.decode(prompt) == f"<|bos|><|user|>{row['prompt'][0]['content']}<|end|><|assistant|>"
        assert data.ids("chosen_ids", i).tolist() == row["chosen_ids"]
        assert data.ids("rejected_ids", i).tolist() == row["rejected_ids"]
        assert data.pair_id(i) == row["pair_id"]


def test_a_system_turn_in_the_prompt_is_rendered(tmp_path: Path, tokenizer: Any) -> None:
    rows = pair_rows(1)
    rows[0]["prompt"] = [{"role": "system", "content": "be kind"}, *rows[0]["prompt"]]
    data, _ = tokenized(tmp_path, tokenizer, rows)
    assert tokenizer.decode(data.ids("prompt_ids", 0)).startswith("<|bos|><|system|>be kind<|end|><|user|>")


def test_an_answer_cut_by_length_gets_no_end_token(tmp_path: Path, tokenizer: Any) -> None:
    rows = pair_rows(1)
    rows[0]["chosen_ids"] = [40, 41, 42]
    data, _ = tokenized(tmp_path, tokenizer, rows)
    assert data.ids("chosen_ids", 0).tolist() == [40, 41, 42]


def test_over_long_and_identical_pairs_are_dropped_and_counted_never_cut(tmp_path: Path, tokenizer: Any) -> None:
    rows = pair_rows(6)
    rows[0]["rejected_ids"] = [9] * 200
    rows[1]["rejected_ids"] = rows[1]["chosen_ids"]
    data, dropped = tokenized(tmp_path, tokenizer, rows)
    assert dropped == {"too_long": 1, "identical": 1}
    assert len(data) == 4
    assert max(data.lengths("prompt_ids") + data.lengths("rejected_ids")) <= 128


def test_a_pair_that_fits_exactly_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    rows = pair_rows(1)
    data, _ = tokenized(tmp_path, tokenizer, rows)
    longest = len(data.ids("prompt_ids", 0)) + max(len(rows[0]["chosen_ids"]), len(rows[0]["rejected_ids"]))
    assert tokenized(tmp_path, tokenizer, rows, max_length=longest)[1]["too_long"] == 0
    assert tokenized(tmp_path, tokenizer, rows, max_length=longest - 1)[1]["too_long"] == 1


def test_file_names_and_row_order_change_nothing(tmp_path: Path, tokenizer: Any) -> None:
    rows = pair_rows(30)
    one, _ = tokenized(tmp_path / "a", tokenizer, rows)
    for name, part in (("z", rows[:11]), ("a", rows[11:])):
        write_pairs(tmp_path / "b" / "pairs" / f"{name}.parquet", part[::-1])
    chat = Chat(tokenizer, model="tiny")
    tokenize_pairs(tmp_path / "b" / "pairs", tmp_path / "b.arrow", chat, vocab_size=265, max_length=128, gap="abs_sum")
    other = TokenizedPairs(tmp_path / "b.arrow")
    for i in range(30):
        assert one.pair_id(i) == other.pair_id(i)
        assert one.ids("chosen_ids", i).tolist() == other.ids("chosen_ids", i).tolist()
    assert (one.column("gap") == other.column("gap")).all()


def test_a_gap_is_times_the_pairs_reliability_where_the_weight_asks_for_it(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**row, "reliability": 0.25 * (i + 1)} for i, row in enumerate(pair_rows(3))]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=pairs_schema(reliability=True)), path)

    def gaps(**how: Any) -> list[float]:
        out = tmp_path / "tokens.arrow"
        chat = Chat(tokenizer, model="tiny")
        tokenize_pairs(path, out, chat, vocab_size=265, max_length=128, gap="l1", **how)
        return pa.ipc.open_file(out).read_all()["gap"].to_pylist()

    plain = gaps()
    assert plain == [row["margin"] for row in rows]
    assert gaps(reliable=True) == [gap * row["reliability"] for gap, row in zip(plain, rows, strict=True)]
    pq.write_table(
        pa.Table.from_pylist([{**rows[0], "reliability": None}], schema=pairs_schema(reliability=True)), path
    )
    with pytest.raises(InputError, match="its l1 gap is nan"):
        gaps(reliable=True)
    write_pairs(path, pair_rows(1))
    with pytest.raises(InputError, match=r"'reliability' is missing; .* scoring.draws of 2 or more"):
        gaps(reliable=True)


@pytest.mark.parametrize("gap", ["abs_sum", "l1", "primary"])
def test_the_gap_is_the_one_that_the_config_names(tmp_path: Path, tokenizer: Any, gap: str) -> None:
    rows = pair_rows(20)
    data, _ = tokenized(tmp_path, tokenizer, rows, gap=gap)
    by_hand = {
        "abs_sum": lambda r: abs(sum(r["chosen_scores"]) - sum(r["rejected_scores"])),
        "l1": lambda r: sum(abs(a - b) for a, b in zip(r["chosen_scores"], r["rejected_scores"], strict=True)),
        "primary": lambda r: abs(r["chosen_scores"][0] - r["rejected_scores"][0]),
    }[gap]
    assert data.column("gap").tolist() == [by_hand(r) for r in sorted(rows, key=lambda r: r["pair_id"])]


def broken(**changes: Any) -> list[dict[str, Any]]:
    rows = pair_rows(3)
    rows[1].update(changes)
    return rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_ids": []}, "chosen_ids is empty"),
        ({"rejected_ids": [7, 265]}, "id 265, the model's vocabulary ends at 264"),
        ({"rejected_ids": [-1, 7]}, "id -1"),
        ({"gap": float("nan")}, "gap is nan"),
        ({"gap": -1.0}, "gap is -1.0"),
    ],
)
def test_a_broken_pair_is_named(tmp_path: Path, tokenizer: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        tokenized(tmp_path, tokenizer, broken(**changes))
    assert "p00000:1:5" in str(e.value)
    assert not (tmp_path / "tokens.arrow").exists()


def test_a_prompt_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    strict = build_tiny_tokenizer(
        "{% if 'river' in messages[0].content %}{{ raise_exception('no such word') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    rows = pair_rows(1)
    rows[0]["prompt"][0]["content"] = "a river"
    with pytest.raises(InputError, match=r"p00000:0:5.*no such word"):
        tokenized(tmp_path, strict, rows)


def test_a_missing_column_and_a_missing_table_are_named(tmp_path: Path, tokenizer: Any) -> None:
    pairs = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(pair_rows(2)).drop_columns(["rejected_ids"]), pairs)
    settings: dict[str, Any] = {"vocab_size": 265, "max_length": 128, "gap": "abs_sum"}
    with pytest.raises(InputError, match="'rejected_ids' is missing"):
        tokenize_pairs(pairs, tmp_path / "t.arrow", Chat(tokenizer, model="tiny"), **settings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pairs here"):
        content_hash(tmp_path / "empty")
    pairs.write_text("not parquet")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        tokenize_pairs(pairs, tmp_path / "t.arrow", Chat(tokenizer, model="tiny"), **settings)


def method(**settings: Any) -> Method[Any]:
    return method_of(train_section(settings))


def test_a_size_matched_subset_is_seeded(tmp_path: Path, tokenizer: Any) -> None:
    data, _ = tokenized(tmp_path, tokenizer, pair_rows(50))
    picks = [select_pairs(data, method(max_pairs=20), seed=s)[0].rows.tolist() for s in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]
    assert len(set(picks[0])) == 20
    selection, dropped = select_pairs(data, method(max_pairs=500), seed=0)
    assert len(selection) == 50
    assert not dropped


def test_dead_pairs_are_dropped_only_when_asked(tmp_path: Path, tokenizer: Any) -> None:
    rows = pair_rows(50)
    dead = sum(r["gap"] == 0 for r in rows)
    data, _ = tokenized(tmp_path, tokenizer, rows)
    assert dead > 0
    assert len(select_pairs(data, method(), seed=0)[0]) == 50
    selection, dropped = select_pairs(data, method(drop_dead=True), seed=0)
    assert (len(selection), dropped["dead"]) == (50 - dead, dead)
    assert (selection.gap > 0).all()


def responses_of(data: TokenizedPairs, selection: Selection, pair: int) -> list[list[int]]:
    """Of one pair, the chosen one first."""
    return [ids.tolist() for _, ids in read_sequences(data, selection, selection.sequences.of_pair[pair])]


def test_shuffled_labels_swap_about_half_of_the_pairs_and_nothing_else(tmp_path: Path, tokenizer: Any) -> None:
    data, _ = tokenized(tmp_path, tokenizer, pair_rows(200))
    selection, _ = select_pairs(data, method(shuffle_labels=True), seed=0)
    swapped = 0
    for i in range(200):
        truth = [data.ids("chosen_ids", i).tolist(), data.ids("rejected_ids", i).tolist()]
        found = responses_of(data, selection, i)
        assert found in (truth, truth[::-1])
        swapped += found != truth
    assert 60 < swapped < 140


def test_a_sequence_is_a_prompt_and_a_response_however_many_pairs_it_is_in(tmp_path: Path, tokenizer: Any) -> None:
    rows = pair_rows(4)
    rows[1]["prompt"] = rows[0]["prompt"]
    rows[1]["rejected_ids"] = rows[0]["chosen_ids"]  # chosen here, rejected there
    rows[2]["chosen_ids"] = rows[0]["chosen_ids"]  # another prompt's: another sequence
    data, _ = tokenized(tmp_path, tokenizer, rows)
    selection, _ = select_pairs(data, method(), seed=0)
    of_pair = selection.sequences.of_pair
    assert len(selection.source) == 7
    assert of_pair[0, 0] == of_pair[1, 1]
    assert len(set(of_pair.ravel().tolist())) == 7
    for i in range(4):
        assert responses_of(data, selection, i) == [rows[i]["chosen_ids"], rows[i]["rejected_ids"]]
        for prompt, response in read_sequences(data, selection, of_pair[i]):
            assert prompt.tolist() == data.ids("prompt_ids", i).tolist()
            assert len(response) > 0
    read = read_sequences(data, selection, np.arange(7))
    assert selection.sequences.tokens.tolist() == [len(p) + len(r) for p, r in read]
    assert selection.sequences.responses.tolist() == [len(r) for _, r in read]
    prompts = selection.sequences.prompt_of_pair
    assert prompts[0] == prompts[1]
    assert len(set(prompts.tolist())) == 3


def test_sft_trains_once_on_each_prompt_and_chosen_answer(tmp_path: Path, tokenizer: Any) -> None:
    rows = pair_rows(4)
    for row in rows:
        row["prompt"] = rows[0]["prompt"]
    rows[2]["chosen_ids"] = rows[0]["chosen_ids"]
    rows[3]["prompt"], rows[3]["chosen_ids"] = [{"role": "user", "content": "else"}], rows[0]["chosen_ids"]
    data, _ = tokenized(tmp_path, tokenizer, rows)
    selection, dropped = select_pairs(data, method(method="sft"), seed=0)
    assert dropped["duplicate"] == 1
    assert selection.rows.tolist() == [0, 1, 3]
    totals = data.lengths("prompt_ids") + data.lengths("chosen_ids")
    sequences = selection.sequences
    assert sequences.tokens[sequences.of_pair[:, 0]].tolist() == totals[[0, 1, 3]].tolist()


def test_weights_over_nothing_but_dead_pairs_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = pair_rows(5)
    for row in rows:
        row["gap"] = 0.0
    data, _ = tokenized(tmp_path, tokenizer, rows)
    with pytest.raises(InputError, match="gap is 0"):
        select_pairs(data, method(), seed=0)
    assert len(select_pairs(data, method(alpha=0.0), seed=0)[0]) == 5
    with pytest.raises(InputError, match="no pairs"):
        select_pairs(data, method(drop_dead=True), seed=0)


def test_an_empty_table_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    data, _ = tokenized(tmp_path, tokenizer, [])
    with pytest.raises(InputError, match="no pairs"):
        select_pairs(data, method(), seed=0)


def test_a_micro_batch_points_at_every_response_token_and_nothing_else() -> None:
    rows = [(np.array([1, 2, 3]), np.array([4, 5])), (np.array([6]), np.array([7, 8, 9, 10]))]
    batch = collate_padded(rows, "cpu")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert batch.targets.tolist() == [4, 5, 7, 8, 9, 10]
    assert batch.owner.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.input_ids.flatten()[batch.predict].tolist() == [3, 4, 6, 7, 8, 9]
    assert batch.real_tokens == 10


def test_a_packed_micro_batch_has_no_padding_and_positions_begin_anew() -> None:
    rows = [(np.array([1, 2, 3]), np.array([4, 5])), (np.array([6]), np.array([7, 8]))]
    batch = collate_packed(rows, "cpu")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.offsets is not None
    assert batch.offsets.tolist() == [0, 5, 8]
    assert batch.targets.tolist() == [4, 5, 7, 8]
    assert batch.owner.tolist() == [0, 0, 1, 1]
    assert batch.input_ids.flatten()[batch.predict].tolist() == [3, 4, 6, 7]
    assert (batch.longest, batch.sequences, batch.real_tokens) == (5, 2, 8)


class Labelled(Method[Any]):
    """As RiC and CPO have it: each answer is an example of its own, its prompt says its scores, and the loss may look
    at the prompt too."""

    sides = ("chosen",)
    columns = ("chosen_scores", "rejected_scores")
    span: Any = "response"

    def render(self, messages: Any, scores: Any, state: Any) -> Any:
        return [{**messages[0], "content": f"{scores} {messages[0]['content']}"}]

    def examples(self, row: Row) -> list[Example]:
        found = []
        for side, ids in (("chosen", row.chosen_ids), ("rejected", row.rejected_ids)):
            scores = row.columns[f"{side}_scores"]
            prompt = row.prompt_ids(self.render(row.messages, scores, None))
            found.append(Example({"chosen": Read(prompt, ids, self.span)}, [sum(scores)]))
        return found


@pytest.mark.parametrize("span", ["response", "all"])
def test_each_answer_is_an_example_of_its_own_behind_its_own_prompt(tmp_path: Path, tokenizer: Any, span: str) -> None:
    labelled = Labelled(train_section({"method": "sft"}))
    labelled.span = span
    rows = pair_rows(6)
    data, _ = tokenized(tmp_path, tokenizer, rows, method=labelled)
    selection, dropped = select_pairs(data, labelled, seed=0)
    assert (len(selection), dropped) == (12, {"duplicate": 0})
    assert selection.targets is not None
    by_id = {row["pair_id"]: row for row in rows}
    for number, (of_pair, target) in enumerate(zip(selection.sequences.of_pair, selection.targets, strict=True)):
        name, _, second = data.pair_id(number).partition("#")
        side = "rejected" if second else "chosen"
        row = by_id[name]
        ((prompt, response),) = read_sequences(data, selection, of_pair)
        asked = f"{row[f'{side}_scores']} {row['prompt'][0]['content']}"
        whole = [*tokenizer.encode(f"<|bos|><|user|>{asked}<|end|><|assistant|>"), *row[f"{side}_ids"]]
        assert [*prompt, *response] == whole
        assert len(response) == (len(whole) - 1 if span == "all" else len(row[f"{side}_ids"]))
        assert selection.sequences.responses[of_pair] == len(response)
        assert selection.sequences.tokens[of_pair] == len(whole)
        assert target == [sum(row[f"{side}_scores"])]
    assert len(np.unique(selection.sequences.prompt)) == len({str(row["prompt"]) for row in rows})
    assert data.column("chosen_key").tolist() != tokenized(tmp_path, tokenizer, rows)[0].column("chosen_key").tolist()


class Broken(Labelled):
    made: Any = None

    def examples(self, row: Row) -> list[Example]:
        return [self.made]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (Example({"rejected": Read([8], [9])}), "no sequence 'chosen', which its sides name"),
        (Example({"chosen": Read([], [9])}), "the sequence has no prompt"),
        (Example({"chosen": Read([8], [265])}), "id 265, the model's vocabulary ends at 264"),
        (Example({"chosen": Read([8], [9])}, [float("nan")]), "targets are \\[nan\\]"),
    ],
)
def test_an_example_that_is_none_is_told_in_one_line(tmp_path: Path, tokenizer: Any, made: Example, told: str) -> None:
    broken_method = Broken(train_section({"method": "sft"}))
    broken_method.made = made
    with pytest.raises(InputError, match=rf"pair 'p00000:0:5'.*{told}") as e:
        tokenized(tmp_path, tokenizer, pair_rows(1), method=broken_method)
    assert "\n" not in str(e.value)


def test_scores_that_a_method_reads_and_pairs_lack_are_told(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**row, "rejected_scores": []} for row in pair_rows(1)]
    with pytest.raises(InputError, match=r"rejected_scores is empty, and train\.method reads it"):
        tokenized(tmp_path, tokenizer, rows, method=Labelled(train_section({"method": "sft"})))


def test_labels_without_a_rejected_answer_cannot_be_shuffled(tmp_path: Path, tokenizer: Any) -> None:
    labelled = Labelled(train_section({"method": "sft", "shuffle_labels": True}))
    data, _ = tokenized(tmp_path, tokenizer, pair_rows(20), method=labelled)
    with pytest.raises(InputError, match=r"train\.shuffle_labels: sft has examples without a rejected answer"):
        select_pairs(data, labelled, seed=0)
