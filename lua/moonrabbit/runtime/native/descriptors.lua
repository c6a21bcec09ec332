--- Waiting for descriptors: what the poller finds goes to those who wait.

local loop = require "moonrabbit.runtime.native.loop"
local descriptors = require "moonrabbit.runtime.shared.descriptors"

local poller = loop.poller

local M = descriptors.of(loop, function(fd, events) return poller:set(fd, events) end)

local notify = M.notify

function loop.dispatch()
  local fd, r, w = poller:next()
  while fd do
    notify(fd, r, w)
    fd, r, w = poller:next()
  end
end

return M
