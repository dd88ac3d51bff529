"""What the launcher's own settings do, and that they are said."""

import subprocess
import sys
import textwrap

from launching import PROJECT, environment, launch

from carelm import ranks


def test_a_default_accelerate_configuration_is_reported(tmp_path):
    (tmp_path / "accelerate").mkdir()
    file = tmp_path / "accelerate/default_config.yaml"
    file.write_text("distributed_type: 'NO'\nnum_machines: 1\nnum_processes: 1\nuse_cpu: true\n")
    done = launch("--dataset_name", "none.csv", "--output_dir", tmp_path / "out", check=False, HF_HOME=str(tmp_path))
    assert f"your accelerate default {file} applies" in done.stderr
    assert "error: dataset_name: there is no file, folder or glob none.csv" in done.stderr and done.returncode != 0


def test_without_a_launcher_nothing_is_asked_for():
    assert ranks.find_launch() is None
    assert ranks.check_launch() is None


def test_on_a_cpu_nothing_is_compiled_at_the_import():
    """bitsandbytes' torch.compile would load torch's compiler into every process; the recipe's torch_compile still can."""
    lines = """
        import os, sys
        from carelm import ranks
        ranks.use_cpu(None)


        assert "bitsandbytes" in sys.modules and "torch._inductor.compile_fx" not in sys.modules
        assert "TORCHDYNAMO_DISABLE" not in os.environ
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(lines)], cwd=PROJECT, env=environment(), check=True)
