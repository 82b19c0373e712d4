"""A template is known by its name and its digest, and a container gets files from the templates in its conf only."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.conftest import SMALL, make_source
from tests.engines import EngineContainer, EngineStore, each_engine
from vzfs import BusyError, Container, DamagedError, Store
from vzfs.cli.app import cli
from vzfs.store.conf import Conf

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def run(store: Store, *words: str) -> Result:
    result = CliRunner().invoke(cli, ["--root", str(store.root), *words])
    assert "Traceback" not in result.output
    return result


def digest_of(top: Path, name: str = "x") -> str:
    """The digest of a template that is made of ``top`` in a store of its own."""
    store = Store(top.parent / f"store-of-{top.name}")
    digest = store.create_template(name, str(top)).info().digest
    shutil.rmtree(store.root)
    assert digest is not None
    assert DIGEST.fullmatch(digest)
    return digest


def settings(container: Container) -> dict[str, str]:
    return Conf.load(container.path / "conf").as_dict()


def change_conf(container: Container, **values: str) -> None:
    conf = container.conf
    for key, value in values.items():
        conf.set(key, value)
    conf.save()


def forget_digests(container: Container) -> None:
    """As an earlier vzfs made it."""
    path = container.path / "conf"
    lines = [line for line in path.read_text().splitlines(keepends=True) if "DIGEST" not in line]
    path.write_text("".join(lines))


# ------------------------------------------------------------------------------------------------------- what it says


def test_copies_have_the_same_digest(tmp_path: Path) -> None:
    first = make_source(tmp_path / "first")
    assert subprocess.run(["cp", "-a", first, tmp_path / "second"]).returncode == 0
    digest = digest_of(first)
    assert digest_of(tmp_path / "second", "another-name") == digest
    store = Store(tmp_path / "vz")
    store.create_template("before", "/usr/share/doc/dpkg")  # so that it gets other inode numbers
    made = store.create_template("x", str(first))
    assert made.info().ino_base != 1 << 31
    assert made.info().digest == digest
    for path in first.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, ns=(1, path.stat().st_mtime_ns))
    assert digest_of(first) == digest


def _content(top: Path) -> None:
    info = (top / "etc/passwd").stat()
    (top / "etc/passwd").write_bytes(b"root:x:0:0::/:/bin/SH\n")
    os.utime(top / "etc/passwd", ns=(info.st_atime_ns, info.st_mtime_ns))


def _link_group(top: Path) -> None:
    """Two files with one content instead of one with two names; everything else stays."""
    info, folder = (top / "usr/share/pair-b").stat(), (top / "usr/share").stat()
    subprocess.run(["cp", "-a", "--remove-destination", top / "usr/share/pair-a", top / "usr/share/new"], check=True)
    os.rename(top / "usr/share/new", top / "usr/share/pair-b")
    assert (top / "usr/share/pair-b").stat().st_mtime_ns == info.st_mtime_ns
    os.utime(top / "usr/share", ns=(folder.st_atime_ns, folder.st_mtime_ns))


def _target(top: Path) -> None:
    link, folder = (top / "etc/dangling").lstat(), (top / "etc").stat()
    (top / "etc/dangling").unlink()
    (top / "etc/dangling").symlink_to("/nowhere/at/ALL")
    os.setxattr(top / "etc/dangling", "trusted.link", b"1", follow_symlinks=False)
    os.utime(top / "etc/dangling", ns=(link.st_atime_ns, link.st_mtime_ns), follow_symlinks=False)
    os.utime(top / "etc", ns=(folder.st_atime_ns, folder.st_mtime_ns))


def _device(top: Path) -> None:
    node, folder = (top / "dev/null").stat(), (top / "dev").stat()
    (top / "dev/null").unlink()
    os.mknod(top / "dev/null", node.st_mode, os.makedev(1, 5))
    os.chmod(top / "dev/null", 0o666)
    os.utime(top / "dev/null", ns=(node.st_atime_ns, node.st_mtime_ns))
    os.utime(top / "dev", ns=(folder.st_atime_ns, folder.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], None]] = {
    "content": _content,
    "mode": lambda top: (top / "bin/tool").chmod(0o4755),
    "owner": lambda top: os.chown(top / "etc/passwd", 1, 0),
    "group": lambda top: os.chown(top / "etc/passwd", 0, 1),
    "time": lambda top: os.utime(top / "etc/empty", ns=(1, 1)),
    "directory-time": lambda top: os.utime(top / "var/empty", ns=(1, 1)),
    "xattr": lambda top: os.setxattr(top / "etc/passwd", "user.note", b"another"),
    "xattr-of-a-directory": lambda top: os.removexattr(top / "etc/conf.d", "user.folder"),
    "acl": lambda top: os.removexattr(top / "usr/acl", "system.posix_acl_default"),
    "link-group": _link_group,
    "target": _target,
    "device": _device,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_container_would_see_changes_it(tmp_path: Path, change: str) -> None:
    source = make_source(tmp_path / "source")
    before = digest_of(source)
    CHANGES[change](source)
    assert digest_of(source) != before


def test_it_is_shown_and_recorded(small_store: EngineStore) -> None:
    shown = json.loads(run(small_store, "template", "show", SMALL, "--json").stdout)["digest"]
    assert DIGEST.fullmatch(shown)
    assert shown in run(small_store, "template", "show", SMALL).stdout
    assert json.loads(run(small_store, "template", "list", "--json").stdout)[0]["digest"] == shown
    container = small_store.create(1, template=SMALL)
    assert settings(container)["OSTEMPLATE_DIGEST"] == shown


# ------------------------------------------------------------------------------------------------------------ compared


def replaced(store: Store, tmp_path: Path, name: str = SMALL) -> tuple[str, str]:
    """Put another template under the name; gives the digests of both."""
    paths = store.layout.template(name)
    before = store.template(name).info().digest
    shutil.rmtree(paths.meta)
    shutil.rmtree(paths.tree)
    source = make_source(tmp_path / "another")
    (source / "etc/passwd").write_text("evil:x:0:0::/:/bin/sh\n")
    after = store.create_template(name, str(source)).info().digest
    assert before is not None
    assert after is not None
    return before, after


def test_a_template_of_that_name_with_other_content_is_refused(small_store: EngineStore, tmp_path: Path) -> None:
    container = small_store.create(1, template=SMALL)
    before, after = replaced(small_store, tmp_path)
    for words in (["mount", "1"], ["mount", "1", "--ro"], ["diff", "1"]):
        refused = run(small_store, *words)
        assert refused.exit_code == 9
        assert before in refused.stderr
        assert after in refused.stderr
        assert str(container.path) in refused.stderr
        assert "vzfs template show" in refused.stderr
    assert not container.status().mounted
    checked = json.loads(run(small_store, "check", "1", "--repair", "--json").stdout)[0]["problems"]
    assert [problem["kind"] for problem in checked] == ["template"]
    assert before in checked[0]["detail"]
    assert after in checked[0]["detail"]
    assert (container.path / "private/etc").is_symlink()  # nothing was torn out for it
    with small_store.create(2, template=SMALL).mounted() as root:
        assert (root / "etc/passwd").read_text().startswith("evil")
    assert run(small_store, "destroy", "1", "--yes").exit_code == 0


@each_engine
def test_an_old_container_gets_the_digest_when_it_is_first_mounted(small_store: EngineStore, engine: str) -> None:
    container = small_store.create(1, template=SMALL)
    path = container.path / "conf"
    path.write_text("# mine\n" + path.read_text() + "CPUUNITS=1000\n")
    digest = settings(container)["OSTEMPLATE_DIGEST"]
    forget_digests(container)
    path.chmod(0o640)
    os.chown(path, 0, 7)
    text = path.read_text()
    small_store.layout.template(SMALL).checked.unlink()  # the store is of an earlier version, too
    assert container.check() == []
    assert list(container.diff()) == []
    with container.mounted(engine=engine, read_only=True):
        pass
    assert path.read_text() == text
    with container.mounted(engine=engine) as root:
        assert settings(container)["OSTEMPLATE_DIGEST"] == digest
        assert (root / "etc/passwd").read_text().startswith("root")
    assert path.read_text() == text + f'OSTEMPLATE_DIGEST="{digest}"\n'
    info = path.stat()
    assert (info.st_mode & 0o7777, info.st_uid, info.st_gid) == (0o640, 0, 7)
    assert small_store.layout.template(SMALL).checked.exists()


def test_further_templates_are_compared_too(small_store: EngineStore, tmp_path: Path) -> None:
    container = with_app(small_store, tmp_path)
    with container.mounted() as root:
        assert (root / "run").read_text() == "run\n"
    words = settings(container)["TEMPLATE_DIGESTS"].split("=")
    assert words[0] == "app"
    assert DIGEST.fullmatch(words[1])
    before, after = replaced(small_store, tmp_path, "app")
    with container.mounted() as root:
        with pytest.raises(OSError) as failure:
            (root / "run").read_text()
        assert failure.value.errno == errno.EIO
        assert (root / "etc/passwd").read_text().startswith("root")
    log = (container.path / "vzfs.log").read_text()
    assert before in log
    assert after in log
    (problem,) = container.check()
    assert problem.kind == "template"
    assert after in problem.detail


# ----------------------------------------------------------------------------------------------------- allowed or not


def make_app(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "app"
    source.mkdir()
    (source / "run").write_text("run\n")
    (source / "folder").mkdir()
    (source / "folder/file").write_text("file\n")
    store.create_template("app", str(source))


def with_app(store: EngineStore, tmp_path: Path) -> EngineContainer:
    """A container that may use a second template, and does."""
    make_app(store, tmp_path)
    container = store.create(1, template=SMALL)
    change_conf(container, TEMPLATES=f"{SMALL} app")
    os.symlink("//vz/template/app/run", container.path / "private/run")
    os.symlink("//vz/template/app/folder", container.path / "private/folder")
    return container


@each_engine
def test_a_link_to_a_template_that_conf_does_not_name_is_not_served(
    small_store: EngineStore, tmp_path: Path, engine: str
) -> None:
    container = with_app(small_store, tmp_path)
    change_conf(container, TEMPLATES=SMALL)
    with container.mounted(engine=engine) as root:
        for path in ("run", "folder", "run"):
            shown = os.lstat(root / path)
            assert (shown.st_mode, shown.st_size) == (stat.S_IFREG, 0), "as any damaged link"
            with pytest.raises(OSError) as failure:
                (root / path).read_bytes()
            assert failure.value.errno == errno.EIO
        with pytest.raises(NotADirectoryError):
            os.stat(root / "folder/file")
        assert (root / "etc/passwd").read_text().startswith("root")
    told = [line for line in (container.path / "vzfs.log").read_text().splitlines() if "not served" in line]
    assert len(told) == 1
    assert "app" in told[0]
    assert "TEMPLATES" in told[0]

    problems = container.check(repair=True)
    assert [(problem.path, problem.kind, problem.repaired) for problem in problems] == [("conf", "template", False)]
    assert "app" in problems[0].detail
    assert f"add app to TEMPLATES in {container.path}/conf" in problems[0].detail
    assert (container.path / "private/run").is_symlink()
    assert run(small_store, "diff", "1", "--content").exit_code == 0
    assert "run\n" not in run(small_store, "diff", "1", "--content").stdout.replace("/run\n", "")

    change_conf(container, TEMPLATES=f"{SMALL} app")
    assert container.check() == []
    with container.mounted(engine=engine) as root:
        assert (root / "folder/file").read_text() == "file\n"


def test_an_origin_in_a_template_that_conf_does_not_name_is_the_containers_own(
    small_store: EngineStore, tmp_path: Path
) -> None:
    make_app(small_store, tmp_path)
    container = small_store.create(1, template=SMALL)
    (container.path / "private/own").write_text("own\n")
    os.setxattr(container.path / "private/own", "trusted.vzfs.origin", b"app/2")
    with container.mounted() as root:
        assert (root / "own").read_text() == "own\n"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_template_that_any_container_may_use_is_not_removed(
    small_store: EngineStore, tmp_path: Path, elsewhere: bool
) -> None:
    make_app(small_store, tmp_path)
    container = small_store.create(tmp_path / "ve/1" if elsewhere else 1, template=SMALL)
    change_conf(container, TEMPLATES=f"{SMALL} app")
    with container.mounted():
        pass
    for name in (SMALL, "app"):
        assert [user.path for user in small_store.template(name).users()] == [container.path]
        with pytest.raises(BusyError):
            small_store.template(name).remove()
    container.destroy()
    for name in (SMALL, "app"):
        small_store.template(name).remove()
    assert small_store.templates() == []


def test_a_container_whose_conf_is_unreadable_counts_as_a_user(small_store: EngineStore) -> None:
    container = small_store.create(1, template=SMALL)
    (container.path / "conf").unlink()
    os.mkfifo(container.path / "conf")
    with pytest.raises(BusyError, match="1"):
        small_store.template(SMALL).remove()
    with pytest.raises(DamagedError):
        container.mount()
