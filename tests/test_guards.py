"""The guards of the suite itself, and that runs leave no hooks and no open files behind."""

import re
import socket
import warnings
from pathlib import Path

import psutil
import pytest
from test_audit import FAST, inputs
from torch import nn

import ibprune
from ibprune.auditing import Side, audit
from ibprune.models import find_source, load_dense

REGISTER = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


@pytest.mark.parametrize("name", ["connect", "connect_ex"])
def test_a_connection_to_another_machine_fails_the_test(name, no_network):
    with socket.socket() as there, pytest.raises(AssertionError, match=r"a test tried to reach \('192\.0\.2\.1', 80\)"):
        getattr(there, name)(("192.0.2.1", 80))  # an address that nobody has
    assert no_network.pop() == ("192.0.2.1", 80)
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        here.listen()
        with socket.socket() as there:
            assert there.connect_ex(here.getsockname()) == 0


def test_a_warning_that_ibprune_raises_is_an_error():
    for module in ("ibprune", "ibprune.budget", "ibprune.mi.probes"):
        with pytest.raises(UserWarning, match="from within"):
            warnings.warn_explicit("from within", UserWarning, "file.py", 1, module=module)
    with pytest.warns(UserWarning, match="from elsewhere"):
        warnings.warn_explicit("from elsewhere", UserWarning, "file.py", 1, module="torch.nn")


def test_the_lock_file_has_the_tested_versions_and_a_hash_of_each():
    """constraints-hashes.txt is made from constraints.txt; its first lines say how."""
    root = Path(__file__).parents[1]
    tested = dict(re.findall(r"^([\w-]+)==(\S+)", (root / "constraints.txt").read_text().replace("_", "-"), re.M))
    locked = re.split(r"\n(?=[a-z])", (root / "constraints-hashes.txt").read_text())[1:]
    found = dict(re.match(r"([\w-]+)==(\S+)", each).groups() for each in locked)
    assert {name: found.get(name) for name in tested if name != "torch"} == {
        name: version for name, version in tested.items() if name != "torch"
    }
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", each) for each in locked)
    assert not [name for name in found if name.startswith(("torch", "nvidia", "cuda")) and name != "torch-pruning"]


def test_a_run_an_audit_and_a_bench_leave_nothing_behind(folders, reviews, tmp_path, monkeypatch):
    hooked = []

    def noting(register):
        def run(self, *args, **options):
            handle = register(self, *args, **options)
            hooked.append((type(self).__name__, handle))
            return handle

        return run

    for name in REGISTER:
        monkeypatch.setattr(nn.Module, name, noting(getattr(nn.Module, name)))
    source, small = folders["BertForSequenceClassification"], str(tmp_path / "out")
    dense = load_dense(find_source(source)).model
    values = dict(mask_steps=4, recover_steps=2, probe_steps=0, batch_size=16, max_length=16, audit=False)
    result = ibprune.prune(source, 0.6, data=reviews, output=small, **values)
    audit(Side("a", dense), Side("b", result.model), inputs(), settings=FAST, layers=("encoder.layer.1",))
    ibprune.bench(source, small, batches=(1,), lengths=(5,), rounds=1)
    assert len(hooked) > 50  # masks, and what the audit and the bench read by
    assert not [kind for kind, handle in hooked if handle.id in (handle.hooks_dict_ref() or ())]
    modules = [*dense.modules(), *result.model.modules()]
    assert not [m for m in modules if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [file.path for file in psutil.Process().open_files() if str(tmp_path) in file.path]
