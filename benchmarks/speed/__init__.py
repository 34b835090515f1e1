"""Time of a decode by part, compared with the limit of the machine and with other ways to decode.

python -m benchmarks.speed --quick                   the included pair, within a minute
python -m benchmarks.speed --pair included 100m      everything, on a CPU
python -m benchmarks.speed length --out DIR          time per step against committed length
python -m benchmarks.speed batch --out DIR           tokens per second against batch size
python -m benchmarks.speed window --out DIR          quality and speed against the window M
python -m benchmarks.speed sampling                  time outside the models by way of sampling
python -m benchmarks.speed targets --out DIR         on a GPU: which targets are met; compiled compared with eager passes
python -m benchmarks.speed launch                    host time of launching a compiled pass, on any machine
python -m benchmarks.speed versus --base DIR         this checkout against another one, on a CPU

Start with `measure.py`, then `instruments.py` and `floor.py`.
"""
