"""Tasks that are made when they are looked at."""

from __future__ import annotations

from array import array

from clip_index.types import Task, Tasks


def test_tasks_are_made_when_they_are_looked_at():
    made = []

    def make(number):
        made.append(number)
        return Task(number, ((f"{number}.tar", 7),))

    tasks = Tasks(make, range(10))
    assert len(tasks) == 10 and len(tasks[1::3]) == 3 and made == []
    assert tasks[-1] == Task(9, (("9.tar", 7),)) and made == [9]
    assert [task.id for task in tasks[1::3][1:]] == [4, 7]
    some = Tasks(tasks.__getitem__, array("q", [2, 5]))
    assert list(some) == [tasks[2], tasks[5]] == list(map(make, [2, 5]))
    assert some == [make(2), make(5)] and some != [make(2)] and some != tasks
    assert tasks[3] in tasks and Task(3, ()) not in tasks
