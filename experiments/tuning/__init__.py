"""Studies: Optuna searches the numbers of an algorithm, of an outer loop, or of whatever a function of a trial runs.

| file | holds |
|---|---|
| `study` | what is searched, and the search: samplers, pruners, workers that join, resume |
| `storage` | where trials are kept: sqlite, journal, a server |
| `workers`, `requeue` | which workers still live; what becomes of the trials of those that died |
| `agents` | studies of PPO, A2C or any objective on an environment |
| `outer` | studies of a meta-training recipe |
| `pbt` | population based training: schedules in place of constants |
| `outputs` | CSV, figures, TensorBoard |

Search spaces stand beside the settings that they range over (`learned_rl.spaces`).
"""
