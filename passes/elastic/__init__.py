"""Elastic networks: one training, a family of subnets, the right one for each device."""

from slim.passes.elastic.elastic import Elastic as Elastic
from slim.passes.elastic.subnet import BestSubnet as BestSubnet
