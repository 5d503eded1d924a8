"""Memory that limits leave: of `ulimit`, and of control groups in both versions."""

import resource

import psutil
import pytest

from ibprune.limits import free_bytes, left_in_groups


def test_a_limit_of_the_shell_is_seen():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + 10**8, before[1]))
    try:
        assert 0 < free_bytes() <= 10**8
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert free_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize("line,folder,names", [
    ("0::/job/step", "", ("memory.max", "memory.current", "inactive_file")),
    ("4:cpu,memory:/job/step", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
])  # fmt: skip
def test_a_control_group_leaves_what_it_and_those_around_it_do_not_take(line, folder, names, tmp_path):
    own, root = tmp_path / "own", tmp_path / "groups"
    own.write_text(f"9:pids:/job\n{line}\n")
    for path, values in (("job", (1000, 800, 50)), ("job/step", ("max", 700, 0))):
        group = root / folder / path
        group.mkdir(parents=True)
        (group / names[0]).write_text(f"{values[0]}\n")
        (group / names[1]).write_text(f"{values[1]}\n")
        (group / "memory.stat").write_text(f"anon 3\n{names[2]} {values[2]}\n")
    assert left_in_groups(root, own) == [250]
    (root / folder / "job/step" / names[0]).write_text("710\n")
    assert left_in_groups(root, own) == [10, 250]
    assert left_in_groups(tmp_path / "none", own) == left_in_groups(root, tmp_path / "nothing") == []
