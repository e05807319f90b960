"""A run learns from an LLM judge's scores, and goes on without them when the judge is away; its key is on no record."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cluster.cli_process import Train, metrics, write_recipe
from tests.rl.verifiers.llm_judge.scripted_endpoint import refuses, says, scripted

KEY = "sk-of-the-judge"


@pytest.mark.exhaustive
def test_a_run_outlives_its_llm_judge(
    tmp_path: Path, tiny_folder: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY_OF_TEST", KEY)
    answers = [says(f"It says {n}.\nSCORE: {n % 11}") for n in range(30)]  # of the trial and the first completions
    with scripted(*answers, refuses(503, "no more of that")) as server:
        code, output = train(
            tmp_path / "log",
            write_recipe(tmp_path, tiny_folder),
            *("layout.data=1", "supervised.steps=4", "rl.steps=4", "checkpoints.every=0"),
            *(f"verifier.llm_judge.url={server.url}", "verifier.llm_judge.model=judge"),
            *("verifier.llm_judge.api_key_env=JUDGE_KEY_OF_TEST", "verifier.llm_judge.patience_s=1"),
            'reward.functions=[{function = "llm_judge", weight = 0.5, name = "style"}]',
        )
        assert code == 0, output
        assert set(server.keys) == {f"Bearer {KEY}"}
    assert "gave 0, from 0 to 10, to a right answer of 2 + 2" in output
    first, *_, last = metrics(tmp_path / "tiny", "rl")
    assert 0 < first["reward/style"] <= 0.5
    assert last["ungradable"] > first["ungradable"]
    assert [line["stage"] for line in metrics(tmp_path / "tiny", "eval")] == ["before", "supervised", "after"]
    rows = pq.read_table(tmp_path / "tiny" / "rollouts" / "step-000001.parquet").to_pylist()
    assert any("LLM judge: It says" in row["reason"] for row in rows)
    rows = pq.read_table(tmp_path / "tiny" / "rollouts" / "step-000004.parquet").to_pylist()
    assert any("answered 503 (no more of that)" in row["reason"] for row in rows if row["reward"] is None)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
