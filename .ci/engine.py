# SPDX-License-Identifier: MIT
"""AppWorld's real engine plays and trains on the data set that appworld_data.py writes.

    export APPWORLD_PYTHON=.venv-appworld/bin/python APPWORLD_ROOT=ROOT
    python -m pytest -q .ci/engine.py
"""
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import appworld_adapter
import skill_sd
from test_skill_sd import ANSWER, chat_model, smallest       # chat_model is a fixture


def test_appworld_plays_two_worlds_at_once_and_trains(tmp_path, chat_model, monkeypatch):
    solved = "apis.supervisor.complete_task(answer='Bravo')"
    episodes = [     # code (none: a bare answer), part of the observation, what is counted
        (solved, "successful", None), ("", "Nothing was run", "no_block"),
        ("apis.supervisor.complete_task(status='fail')", "successful", "failed_status"),
        ("print(41 + 1)\n```\n```python\nprint('other')",
         "[The answer has 2 code blocks; only the first was run.]\n42\n", "several_blocks"),
        ("print((", "Syntax error in line:", "syntax_error"),
        ("while True:\n    pass", "timed out after 5 seconds", "timeout"),
        ("while True:\n    try:\n        apis.api_docs.show_app_descriptions()\n"
         "    except Exception:\n        continue", "timed out after 5 seconds", "timeout"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", None),
        ("import re\napis.spotify.login(username=re.search('a', 'a'), password='b')",
         "status code is 401", None),
        ("apis.supervisor.complete_task(answer=float('-inf'))", "successful", None),
        ("print(1)  # as in ground_truth", "1", "answer_key"),
        ("print('x' * 10**7)\n" * 3, "[29000003 more characters printed]", "cut"),
        ("import os\nprint('\ud800', '\\ud800', *os.environ)", "? ? ", None),
        *[("x = bytes(6 * 10**9)", "MemoryError", None)] * (sys.platform == "linux")]
    def play(code, told, counted):
        env = appworld_adapter.AppWorldEnv("a1c0001_1", max_turns=2, max_chars=600, timeout_s=5)
        if code == solved:                     # what the prompt recommends runs, and is not cut
            asked = appworld_adapter.AppWorldEnv(env.task_id)
            for block in appworld_adapter.code_blocks(asked.reset()):
                assert "failed" not in asked.step(f"```python\n{block}```")[0]
            assert not asked.counts["cut"] and asked.completion() == 1 / 2
            asked.close()
        first = env.reset()
        assert "Ada Example" in first and "2 answers" in first and "2023-05-18" in first
        text, done = env.step(code and ANSWER.format(code))
        assert told in text and len(text) < 700 and "other" not in text and "OPENAI" not in text
        assert {name: n for name, n in env.counts.items() if n} == ({counted: 1} if counted else {})
        assert done == ("complete_task" in code)
        if not done:
            assert env.step(ANSWER.format("print('x' in dir())\nx = 1")) == ("False\n", True)
        env.close()
        assert env.completion() == (1 if code == solved else 1 / 2)
    monkeypatch.setenv("OPENAI_API_KEY", "for the servers to be started with it around")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(play, *zip(*episodes)))
    assert len(appworld_adapter._running) == len(appworld_adapter._idle) == 2
    cfg = smallest(tmp_path, env="appworld_adapter", summarizer="self", iterations=2, group_size=2,
                   tasks_per_iteration=2, max_turns=2, max_context=8000, rollout_batch=2,
                   summary_tokens=4, model=chat_model)
    noop = [appworld_adapter.noop_score(task) for task in appworld_adapter.task_ids("dev")]
    result = skill_sd.train(cfg)
    assert result["sampled"] == result["greedy"] == pytest.approx(noop)      # no word for code
    log = (skill_sd.run_folder(cfg) / "log.jsonl").read_text().splitlines()
    assert [(x["no_block"], x["lost"]) for x in map(json.loads, log[:-1])] == [(2, 0)] * 2
    appworld_adapter.stop_servers()
