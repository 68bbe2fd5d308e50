"""The launcher behind the `deepspeed` command: one `LaunchSpec` in, running ranks out.

Modules, lowest first; none of them imports torch while it is imported, so `--help`, `--version` and `--dry-run` stay
quick:

- `hostfile`, `environment`, `devices`, `ports`: facts about hosts, variables, cores, devices and ports.
- `spec`: `LaunchSpec`, the only description of a launch, and the commands and variables of each rank made from it.
- `multinode`: the command lines of pdsh, MPI and Slurm, made from the same spec. `launcher_helper` is what they start
  per rank.
- `streams`, `processes`, `guard`, `report`: start, watch and end the ranks of one host; who failed first and how it
  is shown.
- `agent`: torch's elastic agent over `processes`. `launch` runs one host, `runner` is the command itself.
"""
