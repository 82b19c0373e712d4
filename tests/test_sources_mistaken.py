"""Sources that are something else: parts of a store, images with layers in them. Refused, with what to do."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import SMALL, make_source
from tests.engines import EngineStore
from vzfs import SourceError, Store
from vzfs.store.conf import Conf

DIGEST = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def refused(store: Store, source: Path) -> str:
    with pytest.raises(SourceError) as failure:
        store.create_template("t", str(source))
    assert failure.value.exit_code == 8
    assert not store.layout.template("t").tree.exists()
    assert not [name for name in os.listdir(store.layout.templates_meta) if name.startswith(".new-")]
    return str(failure.value)


def packed(folder: Path, *, xattrs: bool = True) -> Path:
    archive = folder.parent / f"{folder.name}.tar"
    options = ["--format=posix", *(["--xattrs", "--xattrs-include=*"] if xattrs else [])]
    subprocess.run(["tar", *options, "-C", folder, "-cf", archive, "."], check=True)
    return archive


# --------------------------------------------------------------------------------------------------- parts of a store


@pytest.fixture
def elsewhere(tmp_path: Path) -> Store:
    return Store(tmp_path / "elsewhere")


@pytest.mark.parametrize("what", ["container", "private area", "containers", "unfolded", "copied"])
def test_a_container_is_mounted_instead(small_store: EngineStore, elsewhere: Store, tmp_path: Path, what: str) -> None:
    container = small_store.create(1, template=SMALL)
    with container.mounted() as root:
        (root / "etc/new").write_text("new")
    source = {
        "container": container.path,
        "private area": container.path / "private",
        "containers": container.path.parent,
        "unfolded": container.path / "private/etc",
        "copied": tmp_path / "copied",
    }[what]
    if what == "copied":  # without what only root sees
        subprocess.run(["cp", "-r", "--no-dereference", container.path, source], check=True)
        assert os.listxattr(source / "private") == []
    text = refused(elsewhere, source)
    assert "container" in text
    assert "vzfs mount" in text
    if what in ("container", "private area", "copied"):
        for xattrs in (True, False):
            assert "vzfs mount" in refused(elsewhere, packed(source, xattrs=xattrs))


def test_a_store_is_no_template(small_store: EngineStore, elsewhere: Store) -> None:
    assert "a store of vzfs" in refused(elsewhere, small_store.root)
    assert "a store of vzfs" in refused(elsewhere, small_store.root / "template")
    made = elsewhere.create_template("t", str(small_store.template(SMALL).path))  # but its template's files are
    assert made.info().digest == small_store.template(SMALL).info().digest


def test_a_mounted_container_is_a_source(small_store: EngineStore, elsewhere: Store) -> None:
    with small_store.create(1, template=SMALL).mounted() as root:
        (root / "etc/new").write_text("new")
        made = elsewhere.create_template("t", str(root))
    assert (made.path / "etc/new").read_text() == "new"
    assert (made.path / "etc/passwd").read_text().startswith("root")


def test_what_only_looks_like_a_container_is_a_source(elsewhere: Store, tmp_path: Path) -> None:
    """Programs have folders of these names, and a link of a template's may have any text."""
    source = make_source(tmp_path / "source")
    service = source / "srv/service"
    service.mkdir(parents=True)
    Conf(service / "conf", 'KEY="value"\n').save()
    (service / "lock").touch()
    (service / "private").mkdir()
    (service / "private/key").write_text("secret")
    (service / "private/odd").symlink_to("//vz/template/small/etc")
    (source / ".vzfs").mkdir()
    (source / ".vzfs/index").write_text("mine")
    os.setxattr(service, "trusted.vzfs.origin", b"must not enter")
    for name, where in (("directory", source), ("archive", packed(source))):
        made = elsewhere.create_template(name, str(where))
        assert (made.path / "srv/service/private/key").read_text() == "secret"
        assert os.readlink(made.path / "srv/service/private/odd") == "//vz/template/small/etc"
        assert "trusted.vzfs.origin" not in os.listxattr(made.path / "srv/service")


# --------------------------------------------------------------------------------------------------------------- images


def make_docker_save(top: Path) -> None:
    """As docker wrote it before version 25."""
    (top / DIGEST).mkdir(parents=True)
    (top / DIGEST / "layer.tar").write_bytes(bytes(10240))
    (top / DIGEST / "VERSION").write_text("1.0")
    (top / DIGEST / "json").write_text("{}")
    (top / f"{DIGEST}.json").write_text("{}")
    manifest = [{"Config": f"{DIGEST}.json", "RepoTags": ["debian:12"], "Layers": [f"{DIGEST}/layer.tar"]}]
    (top / "manifest.json").write_text(json.dumps(manifest))
    (top / "repositories").write_text("{}")


def make_oci_layout(top: Path) -> None:
    """As skopeo, buildah and podman write it."""
    (top / "blobs/sha256").mkdir(parents=True)
    (top / "blobs/sha256" / DIGEST).write_bytes(b"")
    (top / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (top / "index.json").write_text('{"schemaVersion": 2, "manifests": []}')


def make_both(top: Path) -> None:
    """As docker has written it since then."""
    make_oci_layout(top)
    manifest = [{"Config": f"blobs/sha256/{DIGEST}", "RepoTags": None, "Layers": [f"blobs/sha256/{DIGEST}"]}]
    (top / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("make", [make_docker_save, make_oci_layout, make_both])
def test_an_image_is_exported_first(elsewhere: Store, tmp_path: Path, make: object) -> None:
    top = tmp_path / "image"
    make(top)  # type: ignore[operator]
    for source in (top, packed(top)):
        text = refused(elsewhere, source)
        assert "image" in text
        assert "docker export" in text
        assert "podman" in text


@pytest.mark.parametrize("text", ["{}", "[]", "[1]", "[" * 100_000, "nothing", '{"name": "a web application"}'])
def test_a_manifest_of_something_else_is_a_file(elsewhere: Store, tmp_path: Path, text: str) -> None:
    top = tmp_path / "root"
    (top / "blobs").mkdir(parents=True)
    (top / "manifest.json").write_text(text)
    assert (elsewhere.create_template("t", str(top)).path / "manifest.json").read_text() == text
    assert elsewhere.create_template("u", str(packed(top))).verify() == []
