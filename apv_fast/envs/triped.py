"""The Triped of the paper's locomotion videos: dm_control's quadruped without one leg.

Its model is made from dm_control's own XML at run time by leaving out the front left leg with everything that refers to
it: joints, tendons, their coupling, actuators, sensors. Task and reward are the quadruped's.

Limit: the paper does not say which leg it removed, nor what it did to the starting height.
"""

from __future__ import annotations

import numpy as np
from dm_control.rl import control
from dm_control.suite import common, quadruped
from lxml import etree

LEG = "front_left"
SPEED = {"walk": 0.5, "run": 5.0}  # m/s from which the reward is full, the quadruped's
_TIME_LIMIT, _CONTROL_TIMESTEP = 20.0, 0.02  # seconds, the quadruped's


def load(task: str, random: np.random.RandomState) -> control.Environment:
    """The environment of ``"walk"`` or ``"run"``, as dm_control's suite would load it."""
    speed = SPEED[task]
    physics = quadruped.Physics.from_xml_string(make_model(floor_size=_TIME_LIMIT * speed), common.ASSETS)
    return control.Environment(
        physics,
        quadruped.Move(desired_speed=speed, random=random),
        time_limit=_TIME_LIMIT,
        control_timestep=_CONTROL_TIMESTEP,
    )


def make_model(floor_size: float) -> bytes:
    """The quadruped's XML without one leg; ``floor_size`` is half the floor's edge in metres."""
    model = etree.XML(quadruped.make_model(floor_size=floor_size))
    hip = model.find(f".//body[@name='hip_{LEG}']")
    gone = {element.get("name") for element in hip.iter() if element.get("name")}
    hip.getparent().remove(hip)
    # What refers to the leg refers to it by name: a fixed tendon through its joints, everything else by an attribute.
    for tendon in model.findall(".//tendon/fixed"):
        if any(joint.get("joint") in gone for joint in tendon):
            gone.add(tendon.get("name"))
            tendon.getparent().remove(tendon)
    for section in ("equality", "actuator", "sensor", "contact"):
        for element in model.findall(f"./{section}/*"):
            if gone & {value for key, value in element.attrib.items() if key != "name"}:
                element.getparent().remove(element)
    result: bytes = etree.tostring(model)
    return result
