# SPDX-License-Identifier: MIT
"""Write a tiny data set in AppWorld's own format, for tests without the official download.

    PYTHON_WITH_APPWORLD appworld_data.py ROOT       # fills ROOT/data, after `appworld install`

One person, three songs, two notes; six tasks over two apps, four in train.txt and two in dev.txt.
The unmodified engine runs and evaluates them. AppWorld's licence asks that public copies of its
code and data stay encrypted: build this where it is needed, never commit it.
"""
import json
import os
import shutil
import sys
from pathlib import Path

PERSON = dict(first_name="Ada", last_name="Example", email="ada.example@example.com")
PHONE = "5551234567"
PASSWORD = "s3cret!"
SONGS = [("Alpha", 10), ("Bravo", 300), ("Charlie", 70)]          # title, play count
NOTES = [("Ideas", "a boat"), ("Old list", "eggs\nmilk")]         # title, content

# A test: (requirement, does an untouched world pass it, the check). The checks run in evaluate():
# `models` has the start and the end state, `answer` what the agent returned.
NO_SONG_CHANGED = ("assert no model changes in spotify.Song.", True,
                   "test.case(sum(map(len, models.changed_records('spotify.Song'))), '==', 0)")
NO_NOTE_CHANGED = ("assert no note was updated or removed.", True,
                   "test.case(len(updated_notes) + len(removed_notes), '==', 0)")
ANSWER = ("assert answers match.", False, "test.answer(answer, ground_truth_answer)")


def playlist_task(title):
    return (f'Create a private Spotify playlist titled "{title}" with all songs in my song '
            "library.", None, [
                (f"assert exactly one playlist titled {title} was added.", False,
                 f"test.case([p.title for p in added_playlists], '==', [{title!r}])"),
                ("assert it contains all library songs.", False,
                 "test.case([s.song_id for s in models.end.spotify.PlaylistSong.find_all("
                 "playlist_id=added_playlists[0].id)], '==', [s.song_id for s in "
                 "models.start.spotify.UserLibrarySong.all()], ignore_order=True)"),
                NO_SONG_CHANGED])


# id -> (instruction, answer or None, tests). The part of an id before "_" names the kind of task.
# No-op scores: 1/2, 1/3, 0/2 (every test of a1c0003_1 needs an action), 1/2, 1/2, 1/3.
TASKS = {
    "a1c0001_1": ("What is the title of the most-played song in my Spotify song library?",
                  "Bravo", [ANSWER, NO_SONG_CHANGED]),
    "a1c0002_1": playlist_task("Mix"),
    "a1c0003_1": ('Add a note titled "Shopping" with the content "bread" to my Simple Note '
                  "account.", None, [
                      ("assert exactly one note titled Shopping was added.", False,
                       "test.case([n.title for n in added_notes], '==', ['Shopping'])"),
                      ("assert its content is bread.", False,
                       "test.case([n.content for n in added_notes], '==', ['bread'])")]),
    "a1c0004_1": ('Delete the note titled "Old list" from my Simple Note account.',
                  None, [
                      ("assert exactly the note titled Old list was removed.", False,
                       "test.case([n.title for n in removed_notes], '==', ['Old list'])"),
                      ("assert no note was added or updated.", True,
                       "test.case(len(added_notes) + len(updated_notes), '==', 0)")]),
    "a1c0005_1": ('What is the content of my Simple Note note titled "Ideas"?',
                  "a boat", [ANSWER, NO_NOTE_CHANGED]),
    "a1c0006_1": playlist_task("Road trip"),
}
SPLITS = {"train": list(TASKS)[:4], "dev": list(TASKS)[4:]}

EVALUATION = '''import json

def evaluate(test, public_data, private_data, main_user, models, ground_truth_answer):
    answer = json.loads(models.end.supervisor.Task.all()[0].answer)
    added_playlists, _, _ = models.changed_records("spotify.Playlist")
    added_notes, updated_notes, removed_notes = models.changed_records("simple_note.Note")
'''


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def evaluation_code(tests):
    blocks = [f"    with test({requirement!r}):\n        {check}\n"
              for requirement, _, check in tests]
    return EVALUATION + "".join(blocks) + "    return test\n"


def write_base(data, models, documentation, now):
    """data/base_dbs: what every task starts from, and the documentation of the APIs."""
    for page in documentation:
        models.api_docs.ApiDoc.create_save(**page)
    person = models.admin.MainUser.create_save(
        **PERSON, phone_number=PHONE, birthday="1990-01-01", sex="female")
    account = dict(PERSON, password=PASSWORD, verified=True, created_at=now.subtract(years=1),
                   last_logged_in=now.subtract(days=1))
    listener = models.spotify.User.create_save(**account)
    writer = models.simple_note.User.create_save(**account)
    for app in ("spotify", "simple_note"):
        models.admin.AccountPassword.create_save(
            main_user_id=person.id, account_name=app, password=PASSWORD)
    artist = models.spotify.Artist.create_save(name="Nobody", genre="pop")
    for title, play_count in SONGS:
        song = models.spotify.Song.create_save(
            title=title, artist_ids=[artist.id], genre="pop", duration=200, play_count=play_count,
            release_date=now.subtract(years=2), like_count=0, review_count=0, rating=0.0)
        models.spotify.UserLibrarySong.create_save(
            user_id=listener.id, song_id=song.id, added_at=now.subtract(days=3))
    for title, content in NOTES:
        models.simple_note.Note.create_save(
            user_id=writer.id, title=title, content=content, created_at=now.subtract(days=9),
            updated_at=now.subtract(days=9))
    models.save(str(data / "base_dbs"), format="full", delete_if_exists=True,
                app_names=models.app_names)


def write_task(data, task_id, models, now, version):
    """data/tasks/ID: what the engine loads (specs, changes to the base) and how it evaluates."""
    instruction, answer, tests = TASKS[task_id]
    models.start_db_tracker()
    supervisor = models.supervisor.Supervisor.create_save(
        **PERSON, phone_number=PHONE, birthday="1990-01-01", sex="female")
    for app in ("spotify", "simple_note"):
        models.supervisor.AccountPassword.create_save(
            supervisor_id=supervisor.id, account_name=app, password=PASSWORD)
    models.supervisor.Task.create_save(supervisor_id=supervisor.id, instruction=instruction)
    folder = data / "tasks" / task_id
    truth = folder / "ground_truth"
    truth.mkdir(parents=True)
    models.save(str(folder / "dbs"), format="changes", delete_if_exists=True,
                app_names=models.app_names, save_model_hashes=True)
    write_json(folder / "specs.json", dict(
        instruction=instruction, supervisor=dict(PERSON, phone_number=PHONE),
        datetime=now.isoformat(), db_version=version))
    write_json(truth / "public_data.json", {})
    write_json(truth / "private_data.json", {})
    write_json(truth / "answer.json", answer)
    write_json(truth / "metadata.json", dict(
        difficulty=1, mode="minimal", num_apps=1, num_apis=3, num_api_calls=3,
        num_solution_code_lines=5))
    write_json(truth / "test_data.json", [
        dict(requirement=requirement, label="no_op_pass" if untouched else "no_op_fail")
        for requirement, untouched, _ in tests])
    (truth / "evaluation.py").write_text(evaluation_code(tests))


def build(root):
    data = Path(root).absolute() / "data"
    if data.exists() and not (data / "made_by_appworld_data").exists():
        raise ValueError(f"ROOT={root!r}: {data} was not made by this script (the official data?); "
                         "give another folder")
    os.environ["APPWORLD_ROOT"] = str(data.parent)       # before the first import of appworld
    from appworld.api_docs import prepare_api_docs
    from appworld.apps import get_all_apps
    from appworld.apps.model_lib import (CachedDBHandler, get_db_home_path,
                                         get_direct_cached_sqlite3_connection)
    from appworld.collections.api_docs import ApiDocCollection
    from appworld.collections.models import ModelCollection
    from appworld.common.constants import CANARY_STRING, DB_VERSION
    from appworld.common.constants import DEFAULT_SYSTEM_DATETIME as NOW
    from appworld.common.utils import freeze_time

    shutil.rmtree(data, ignore_errors=True)
    (data / "base_dbs").mkdir(parents=True)
    (data / "datasets").mkdir()
    (data / "made_by_appworld_data").touch()
    apps, visible = get_all_apps(), get_all_apps(skip_admin=True)

    def load(storage, create_db=False):
        return ModelCollection.load(
            to_db_home_path=storage, from_db_home_path=str(data / "base_dbs"), load_apps=apps,
            create_db=create_db)

    with freeze_time(NOW):
        models = load(get_db_home_path("memory", "base"), create_db=True)
        documentation = [
            {("app_name_" if key == "app_name" else key): value for key, value in page.items()}
            for app in visible for page in prepare_api_docs(app)]
        write_base(data, models, documentation, NOW)
    (data / "version.txt").write_text(DB_VERSION)
    (data / "base_dbs" / "version.txt").write_text(DB_VERSION)
    standard = data / "api_docs" / "standard"
    standard.mkdir(parents=True)
    for app, pages in ApiDocCollection.build(tuple(visible)).items():
        write_json(standard / f"{app}.json", {
            name: dict(page, canary_string=CANARY_STRING) for name, page in pages.items()})
    CachedDBHandler.reset()
    get_direct_cached_sqlite3_connection.cache_clear()
    for task_id in TASKS:
        with freeze_time(NOW):
            models = load(get_db_home_path("memory", "task_input", task_id=task_id))
            write_task(data, task_id, models, NOW, DB_VERSION)
        CachedDBHandler.reset()
    for split, ids in SPLITS.items():
        (data / "datasets" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    print(f"{len(TASKS)} tasks in {data}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    build(sys.argv[1])
