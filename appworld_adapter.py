# SPDX-License-Identifier: MIT
"""The real AppWorld (Trivedi et al., 2024, https://appworld.dev) as an environment.

    python3.11 -m venv .venv-appworld && .venv-appworld/bin/pip install appworld==0.1.3.post1
    .venv-appworld/bin/appworld install                         # unpack the code of the apps
    .venv-appworld/bin/appworld verify tests
    .venv-appworld/bin/appworld download data --root ROOT       # DELETES an existing ROOT/data
    .venv-appworld/bin/appworld verify tasks --root ROOT
    export APPWORLD_PYTHON=.venv-appworld/bin/python APPWORLD_ROOT=ROOT
    python appworld_adapter.py [TASK_ID]                        # list the tasks, or play one

AppWorld pins old packages, freezes the clock of its process and can hold one world per process.
So every open world is a server process (about 280 MB), spoken to by HTTP. Servers are reused
between episodes, replaced after RESETS_PER_SERVER resets or when they fail, and end with this
process, however it ends. Needs a POSIX sh; APPWORLD_CACHE, if set, is passed on.

SAFETY. Code that a model writes runs in the server process WITH YOUR RIGHTS: your files, your
network. AppWorld blocks some calls (open, subprocess ...); that stops accidents, not intent: it is
no sandbox. Servers listen on loopback only, but anybody on this machine can reach them there. They
get a bare environment, so that no key of yours can be printed. The answers to the tasks lie in the
data, too: a block that names their place is counted as `answer_key`. For a wall, use a container:

    docker run --rm --init --gpus all --network none -v "$PWD":/work -w /work \\
        -v "$APPWORLD_ROOT":/appworld -e APPWORLD_ROOT=/appworld \\
        -e APPWORLD_PYTHON=/opt/appworld/bin/python IMAGE \\
        python skill_sd.py --env appworld_adapter --model DIR

A server outlives an episode, and so does what the code did to Python's own modules in it.
"""
import atexit
import contextlib
import functools
import http.client
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import types
from pathlib import Path

RESETS_PER_SERVER = 200    # then a fresh process: one grows by about 1 MB per reset
START_SECONDS = 120        # process start until it listens (2 s on an idle machine)
REQUEST_SECONDS = 300      # any request but a code block (a server's first reset takes 3-20 s)
GRACE_SECONDS = 30         # a block may take `timeout_s`, which the engine watches, and this
MEMORY_BYTES = 4 << 30     # address space of a server; only where the system enforces it (Linux)
PRINT_CHARS = 1_000_000    # what a server keeps of the output of one block
ANSWER_BYTES = 16 << 20    # longest HTTP answer accepted

DATA_VERSION = "0.1.0"     # that the engine of this version was made for

INSTALL = ("python3.11 -m venv .venv-appworld && .venv-appworld/bin/pip install "
           "appworld==0.1.3.post1 && export APPWORLD_PYTHON=.venv-appworld/bin/python")
UNPACK = "$APPWORLD_PYTHON -m appworld.cli install"
DOWNLOAD = ("export APPWORLD_ROOT=SOME_FOLDER && "
            "$APPWORLD_PYTHON -m appworld.cli download data --root $APPWORLD_ROOT")


class AppWorldError(OSError):
    """AppWorld is not where the settings say, or no server came up, or one was lost. Only reset()
    and noop_score() let it out."""
    told = True                # in one line, without a traceback


# ---- where AppWorld is, and its tasks ------------------------------------------------------------
def appworld_python():
    value = os.environ.get("APPWORLD_PYTHON", "")
    if shutil.which(value) is None:
        raise AppWorldError(f"APPWORLD_PYTHON={value!r} is not a program; run: {INSTALL}")
    return os.path.abspath(shutil.which(value))     # not resolved: the link is what makes a venv


def appworld_data():
    value = os.environ.get("APPWORLD_ROOT", "")
    data = Path(value).absolute() / "data"
    if not value or not (data / "datasets").is_dir() or not (data / "tasks").is_dir():
        raise AppWorldError(f"APPWORLD_ROOT={value!r} has no data/datasets and data/tasks; "
                            f"run: {DOWNLOAD}")
    version = data / "version.txt"
    if version.exists() and version.read_text().strip() != DATA_VERSION:
        raise AppWorldError(f"APPWORLD_ROOT={value!r} holds data of version "
                            f"{version.read_text().strip()!r}, not {DATA_VERSION}; run: {DOWNLOAD}")
    return data


def task_ids(split):
    """The official data has train (90 tasks), dev (57), test_normal and test_challenge."""
    files = {path.stem: path for path in (appworld_data() / "datasets").glob("*.txt")}
    if split not in files:
        raise ValueError(f"split={split!r} must be one of {sorted(files)} "
                         f"in {appworld_data() / 'datasets'}")
    return [line.split(":")[0] for line in files[split].read_text().split()]    # "id:tag" or "id"


# ---- server processes ----------------------------------------------------------------------------
# sh, with a pipe from us as stdin, leaves a watcher behind and becomes the server. When our end of
# the pipe closes, because we stop the server or because we died in whatever way, the watcher kills
# the process group: server, watcher, and anything that the code forked.
LAUNCH = """
exec 3<&0 </dev/null
{ read -r _ <&3; kill -9 0; } >&2 &
ulimit -v "$1" 2>/dev/null; shift
exec "$@" 3<&-
"""
# The app of `appworld serve environment`, with differences. It listens on loopback, on a port that
# the kernel chooses (so none can be taken) and that it tells us once it listens. What a block
# prints is bounded while it prints: else it fills memory, the engine's log and the answer. A block
# that catches Exception cannot outlive its time; KeyboardInterrupt and infinity are no errors of
# the engine's.
SERVER = """
import json, os, signal, sys
ready = os.dup(1)
os.dup2(2, 1)
import io, socket, uvicorn
import IPython.utils.capture
import appworld.environment, appworld.requester
import starlette.responses
from IPython.core.interactiveshell import ExecutionResult
import appworld.apps.supervisor.constants
from appworld.serve.environment import app

class Printed(io.StringIO):
    dropped = 0
    def write(self, text):
        kept = text[:max(0, int(sys.argv[1]) - self.tell())]
        super().write(kept)
        self.dropped += len(text) - len(kept)
        return len(text)
    def getvalue(self):
        text = super().getvalue().encode("utf-8", "replace").decode()
        return text + f"\\n[{self.dropped} more characters printed]" * (self.dropped > 0)

class Overrun(BaseException):
    pass

def timeout_call(function, timeout_seconds, **given):
    def stop(signum, frame):
        raise Overrun
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, timeout_seconds, 1.0)     # again, if it goes on
    try:
        result = function(**given)
        return None if isinstance(result.error_in_exec, Overrun) else result
    except Overrun:
        return None                                                # the engine's own "timed out"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

def raise_error(self, own=ExecutionResult.raise_error):
    try:
        own(self)
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        raise RuntimeError(type(error).__name__) from error

def encodable(request, own=appworld.requester.jsonable_encoder):
    try:
        return own(request)
    except ValueError:                                             # a regex's match, say
        return repr(request)

IPython.utils.capture.StringIO = Printed
appworld.requester.jsonable_encoder = encodable
appworld.environment.timeout_call = timeout_call
ExecutionResult.raise_error = raise_error
starlette.responses.JSONResponse.render = lambda self, content: json.dumps(content).encode()
listener = socket.create_server(("127.0.0.1", 0))
os.write(ready, b"%d\\n" % listener.getsockname()[1])
os.close(ready)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
"""
PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "APPWORLD_CACHE")


class Server:
    """One AppWorld process. Its log is kept under APPWORLD_ROOT/experiments/outputs/skill_sd."""

    def __init__(self):
        python, root = appworld_python(), appworld_data().parent
        outputs = root / "experiments" / "outputs" / "skill_sd"
        outputs.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="server_", dir=outputs))
        self.log = self.folder / "server.log"
        self.resets = 0
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment.update(APPWORLD_ROOT=str(root), PYTHONHASHSEED="0")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", LAUNCH, "sh", str(MEMORY_BYTES >> 10),
                 python, "-c", SERVER, str(PRINT_CHARS)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=root,
                env=environment, start_new_session=True)       # so that Ctrl-C is for us alone
        _running.add(self)
        timer = threading.Timer(START_SECONDS, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()       # the port, or nothing: the process ended
            if not line.strip().isdigit():
                raise AppWorldError("no AppWorld server came up (START_SECONDS="
                                    f"{START_SECONDS}): {self.complaint()}; see {self.log}")
            self.port = int(line)
        except BaseException:
            self.stop()
            raise
        finally:
            timer.cancel()

    def complaint(self):
        """The last line of the log, and what to do about it where that is known."""
        text = self.log.read_text(errors="replace").strip()
        remedy = UNPACK if "No module named 'appworld." in text else INSTALL
        return text.rpartition("\n")[2] + f"; run: {remedy}" * ("No module named" in text)

    def post(self, path, seconds, body):
        """What the model wrote travels as JSON, never as part of a command or a URL."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("POST", f"/{path}", json.dumps(body),
                               {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read(ANSWER_BYTES + 1)
            if response.status == 200 and len(answer) <= ANSWER_BYTES:
                return json.loads(answer)["output"]
            why = f"HTTP {response.status}, {len(answer)} bytes (at most {ANSWER_BYTES})"
        except TimeoutError:
            why = f"no answer in {seconds} s (a busy machine, or code that swallows its timeout)"
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            why = f"the server died or talks nonsense ({error!r})"
        finally:
            connection.close()
        raise AppWorldError(f"AppWorld lost: /{path} on {body['task_id']}: {why}; see {self.log}")

    def stop(self):
        _running.discard(self)
        self.process.stdin.close()          # the watcher kills the group
        self.process.kill()                 # also when the watcher is gone
        self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.folder / "tasks", ignore_errors=True)


# Servers without a world; all servers. Threads share them: every use is one (atomic) operation.
_idle, _running = [], set()


def take_server():
    try:
        return _idle.pop()
    except IndexError:
        return Server()


def give_back(server):
    server.resets += 1
    if server.resets >= RESETS_PER_SERVER:
        server.stop()
    else:
        _idle.append(server)


@atexit.register
def stop_servers():
    """End all servers now (open worlds are lost); the next reset starts a new one."""
    _idle.clear()
    for server in list(_running):
        server.stop()


# ---- what the model reads, and what of its answer is run -----------------------------------------
SYSTEM_PROMPT = ("You carry out tasks for your supervisor in their apps, on your own, by writing "
                 "Python code that is run for you step by step.")
FIRST_MESSAGE = """\
I am your supervisor: {first_name} {last_name}, e-mail {email}, phone {phone_number}. \
It is {datetime}.

In every answer write ONE code block that begins with ```python and ends with ```. It is run, \
variables stay, and you get back what it prints; so print what you need to see. You reach my apps \
only as `apis.APP_NAME.API_NAME(ARGUMENTS)`. To look up what there is:
```python
for app in apis.api_docs.show_app_descriptions():
    print(app["name"], "-", app["description"])
for api in apis.api_docs.show_api_descriptions(app_name="spotify"):
    print(api["name"], "-", api["description"])
print(apis.api_docs.show_api_doc(app_name="spotify", api_name="login"))
```
Read an API's doc before you call it. Most APIs want the access_token that the app's `login` \
returns. Lists come in pages: raise page_index until a page is empty. My passwords, addresses and \
payment cards are in the supervisor app, friends and family are contacts in the phone app, files \
are in the file_system app. Do what the task asks and nothing beyond it, without asking me. An \
example, for "How many songs are in my Spotify library?":
```python
passwords = {{p["account_name"]: p["password"] for p in apis.supervisor.show_account_passwords()}}
token = apis.spotify.login(username="{email}", password=passwords["spotify"])["access_token"]
songs, page_index = [], 0
while page := apis.spotify.show_song_library(access_token=token, page_index=page_index):
    songs, page_index = songs + page, page_index + 1
apis.supervisor.complete_task(answer=len(songs))
```

When the task is done, call `apis.supervisor.complete_task(answer=...)`, with the bare answer \
(numbers in digits) if the task asks for one, without arguments if not; \
`complete_task(status="fail")` if it cannot be done. You have {max_turns} answers.

Task: {instruction}"""
NO_BLOCK = ("[Nothing was run: the answer has no complete code block. It begins with a line "
            "```python and ends with a line ```.]")
FIRST_ONLY = "[The answer has {n} code blocks; only the first was run.]\n"

# Fences begin a line, but for blanks, so that code may hold one inside a string. A block that the
# end of the answer cuts off is none: half of it could do harm.
BLOCK = re.compile(r"^[ \t]*```python[ \t\r]*\n(.*?)^[ \t]*```(?!\w)", re.DOTALL | re.MULTILINE)
ANSWER_KEY = re.compile(r"ground_truth|\bappworld\b")
COUNTED = ("no_block", "several_blocks", "syntax_error", "timeout", "cut", "failed_status",
           "answer_key", "killed", "lost")


def code_blocks(response):
    """The code in an answer; skill_sd.py has taken what the model only thinks out of it."""
    return [textwrap.dedent(block) for block in BLOCK.findall(response)]


def cut(text, max_chars):
    """Head and tail of a text that is too long, with a note of what is missing between them."""
    if len(text) <= max_chars:
        return text
    tail = max_chars // 2
    return (f"{text[:max_chars - tail]}\n[... {len(text) - max_chars} characters cut here ...]\n"
            f"{text[len(text) - tail:]}")


# ---- the environment -----------------------------------------------------------------------------
class AppWorldEnv:
    """One task. An episode ends with complete_task(), whatever its status, or after max_turns.

    Every answer is a turn, also one that runs nothing. `counts` says what went wrong in the
    episode: answers with no_block, several_blocks (the first is run) or a syntax_error; blocks
    that ran into a timeout; outputs that were cut; failed_status: the model gave up (the tests
    decide all the same what was completed); blocks that name where the answer_key is; killed: 1 if
    a block hung or ended the server, so that the episode is over, with the completion after the
    block before it, or 0; lost: 1 if the server died by itself or answered nonsense. A lost episode
    is over and its completion() is nan: leave it out, it has no score.
    """
    concurrent = True              # worlds may step in threads: each has its own process
    system_prompt = SYSTEM_PROMPT

    # CHOICE: 12,000 characters of output a turn (about 3,000 tokens), half of them from its end:
    # room for any list of APIs. The engine's own limit of time.
    def __init__(self, task_id, max_turns=40, max_chars=12_000, timeout_s=100):
        if task_id not in os.listdir(appworld_data() / "tasks"):    # the engine answers a bare 500
            raise ValueError(f"task_id={task_id!r} is not in {appworld_data() / 'tasks'}; "
                             "task_ids('train') gives the ids of a split")
        for name, value in (("max_turns", max_turns), ("max_chars", max_chars),
                            ("timeout_s", timeout_s)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        self.task_id, self.max_turns = task_id, max_turns
        self.max_chars, self.timeout_s = max_chars, timeout_s
        self.counts = dict.fromkeys(COUNTED, 0)
        self._server, self._completion, self._over, self._turns = None, None, True, 0
        self._ran = False              # whether a block has had the engine's attention

    def reset(self):
        """The first message. AppWorldError if no server comes up, or a new one fails at once."""
        self.close()
        self.counts, self._completion = dict.fromkeys(COUNTED, 0), None
        server = self._server = take_server()
        self._over, self._turns, self._ran = False, 0, False
        try:
            world = self._ask("initialize", timeout_seconds=self.timeout_s,     # a name of its own
                              experiment_name=f"skill_sd/{server.folder.name}")
        except AppWorldError:
            if not server.resets:
                raise
            return self.reset()    # it died since, or an earlier episode's code has damaged it
        return FIRST_MESSAGE.format(**world["supervisor"], datetime=world["datetime"],
                                    instruction=world["instruction"], max_turns=self.max_turns)

    def step(self, response):
        """(text, done). If the server is lost, the text says how in one line and done is True."""
        if self._over:
            raise RuntimeError(f"step on {self.task_id}: no open episode; call reset() first")
        self._turns += 1
        blocks, completed, observation = code_blocks(response), False, NO_BLOCK
        self.counts["no_block"] += not blocks
        self.counts["several_blocks"] += len(blocks) > 1
        try:
            if blocks:
                note = FIRST_ONLY.format(n=len(blocks)) if len(blocks) > 1 else ""
                observation = note + self._run(blocks[0])
                completed = self._ask("task_completed")
                self._score()
            if completed:
                status = "print(apis.supervisor.show_active_task()['status'])"
                self.counts["failed_status"] += self._ask("execute", code=status).strip() == "fail"
            if completed or self._turns >= self.max_turns:
                if self._completion is None:
                    self._score()
                self._over = True
        except AppWorldError as error:
            return f"[{error}]", True
        return observation, self._over

    def _run(self, code):
        code = code.encode("utf-8", "replace").decode()    # a lone surrogate would be a 500
        self._ran = True
        self.counts["answer_key"] += bool(ANSWER_KEY.search(code))
        output = self._ask("execute", seconds=self.timeout_s + GRACE_SECONDS, code=code)
        before, _, error = output.partition("Execution failed. Traceback:\n")   # engine's words
        if not before:
            self.counts["syntax_error"] += error.startswith("Syntax error in line:")
            self.counts["timeout"] += error.rstrip().endswith(f"after {self.timeout_s} seconds.")
        self.counts["cut"] += len(output) > self.max_chars
        return cut(output, self.max_chars)

    def completion(self):
        """Tests passed / tests; 1.0 is success. Doing nothing does not score 0: noop_score."""
        if self._completion is None and self._server is None:
            raise RuntimeError(f"completion of {self.task_id}: no episode; call reset() first")
        if self._completion is None:
            with contextlib.suppress(AppWorldError):   # it is nan then
                self._score()
        return self._completion

    def close(self):
        """Score an open episode, so that completion() can still be asked; free the server."""
        if self._server is not None:
            self.completion()
            with contextlib.suppress(AppWorldError, AttributeError):   # lost: there is no server
                self._ask("close")
                give_back(self._server)
            self._server, self._over = None, True

    def _score(self):
        result = self._ask("evaluate", suppress_errors=True)
        self._completion = len(result["passes"]) / result["num_tests"]

    def _ask(self, path, seconds=None, **body):
        alive = self._server.process.poll() is None
        try:
            body["task_id"] = self.task_id
            return self._server.post(path, seconds or REQUEST_SECONDS, body)
        except BaseException as error:     # Ctrl-C too: it is busy with what nobody waits for
            self._server.stop()
            if not self._over:     # an episode that has ended keeps its score
                # CHOICE: an engine that a block has ended is the model's doing, no lost episode
                killed = alive and self._ran and isinstance(error, AppWorldError)
                self._completion = (self._completion or 0.0) if killed else math.nan
                self.counts["killed" if killed else "lost"] = 1
            self._server, self._over = None, True
            raise


def make_world(cfg):
    """The world of skill_sd.py: train and heldout, the ids of the train and dev split, make_env(id)
    and no levels."""
    return types.SimpleNamespace(train=task_ids("train"), heldout=task_ids("dev"), levels=[],
                                 make_env=lambda task_id: AppWorldEnv(task_id, cfg.max_turns))


@functools.lru_cache(maxsize=None)
def noop_score(task_id):
    """completion of a world in which nothing was done: the floor to read a score against."""
    env = AppWorldEnv(task_id)
    env.reset()
    env.close()
    if env.counts["lost"]:         # raised, so that the cache does not keep it
        raise AppWorldError(f"noop_score of {task_id}: the server was lost; try again")
    return env.completion()


def main():
    if len(sys.argv) == 1:
        for path in sorted((appworld_data() / "datasets").glob("*.txt")):
            print(f"{path.stem}:", *task_ids(path.stem))
        return
    env = AppWorldEnv(sys.argv[1])
    print(env.reset(), "\n\nType code; an empty line runs it, Ctrl-D leaves.")
    lines, over = [], False
    for line in sys.stdin:
        lines.append(line)
        if not line.strip():
            observation, over = env.step("```python\n" + "".join(lines) + "```")
            print(observation)
            lines = []
        if over:
            break
    print(f"completion {env.completion():.2f}, doing nothing {noop_score(env.task_id):.2f}")
    env.close()


if __name__ == "__main__":
    main()
