"""The README and the pages of docs/: links lead somewhere, commands are typed by a test or name the
hardware they need, and what is made from the code is up to date."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import PROGRAM, ROOT

sys.path.insert(0, str(ROOT / "docs"))
import reference

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/**/*.md")]
TESTS = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
TESTS = re.sub(r"""["']\n\s*["']""", "", TESTS)  # strings of several parts
PARTS = re.search(r"parts=\((\w.*)\)", (ROOT / ".ci/run").read_text())[1].split()
MARK = "# needs "  # hardware or a network that no test has


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} is not there"
        assert not anchor or anchor in anchors(target), f"{link} is no heading"


def commands(page: Path) -> list[str]:
    """The command lines of its bash blocks; one that is continued is one."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for b in blocks for line in re.sub(r"\\\n\s*", "", b).splitlines() if line.strip()]


def test_commands_of_the_readme_are_typed_by_a_test_or_name_what_they_need():
    found = commands(ROOT / "README.md")
    assert len(found) > 30
    for command in found:
        line = command.split("  #")[0].strip()
        run_by_ci = line.startswith("make ") and line.split()[1] in PARTS
        typed = re.search(rf"""["'\\n]{re.escape(line)}["'\\]""", TESTS)
        assert MARK in command or run_by_ci or typed, f"no test types: {line}"


def test_the_tests_that_pages_name_exist():
    made = set(re.findall(r"\bdef (test_\w+)", TESTS)) | {p.stem for p in ROOT.glob("tests/*.py")}
    for page in ROOT.glob("docs/*.md"):
        assert set(re.findall(r"\btest_\w+", page.read_text())) <= made, page.name


def test_the_reference_has_every_key_as_it_is():
    assert reference.PAGE.read_text() == reference.reference(), "run python docs/reference.py"


def test_each_picture_is_made_from_its_data_and_shown(tmp_path):
    for path in (*ROOT.glob("docs/*.jsonl"), ROOT / "docs/pictures.py"):
        shutil.copyfile(path, tmp_path / path.name)
    subprocess.run([sys.executable, "pictures.py"], cwd=tmp_path, check=True)
    made = {path.name for path in tmp_path.glob("*.png")}
    assert {path.name for path in ROOT.glob("docs/*.png")} == made | {"demo.png"}  # a run's own
    for name in made:
        assert any(f"{name})" in page.read_text() for page in PAGES), f"{name} is not shown"


def test_the_readme_counts_the_lines_that_there_are():
    sys.path.insert(0, str(ROOT / "bench"))
    from loc import CORE, code_lines

    product = [path for path in PROGRAM if "data" not in path.relative_to(ROOT).parts]
    readme = (ROOT / "README.md").read_text()
    for name, files in (("these six", [ROOT / name for name in CORE]), ("all", product)):
        code = sum(map(code_lines, files))
        row = rf"\| Python, {name} \| {len(files)} \| [\d,]+ \| [\d,]+ \| {code:,} \|"
        assert re.search(row, readme), f"{name}: {len(files)} files, {code:,} lines"


def test_uv_installs_what_pip_installs():
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    locked = {package["name"]: package.get("version") for package in packages}
    for line in (ROOT / "requirements.txt").read_text().splitlines()[1:]:
        name, _, version = line.partition("==")
        assert locked[name.lower().replace("_", "-")] == version, f"{name}: run uv lock"
