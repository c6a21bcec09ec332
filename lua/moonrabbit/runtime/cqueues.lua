--- The runtime for cqueues: tasks are coroutines of a cqueue, beside the user's own.
--
-- A connection belongs to the cqueue that it was opened in: what waits for it is woken there, and a
-- call from another one throws. `spawn` starts tasks in the cqueue that runs. Names are looked up by
-- the system (getaddrinfo, in threads of ours) and not by cqueues.dns, which knows nothing of
-- nsswitch.conf, and so not of what containers, mDNS and directories call a host.

local ok, cqueues = pcall(require, "cqueues")
if not ok then
  error("the runtime 'cqueues' needs the module cqueues (luarocks install cqueues; Debian: lua-cqueues): "
    .. (tostring(cqueues):match "[^\n]+"), 0)
end
local condition = require "cqueues.condition"
local hosted = require "moonrabbit.runtime.shared.hosted"

local poll, running, new_condition = cqueues.poll, cqueues.running, condition.new

local host = {
  name = "cqueues",
  outside = "it must be made in a cqueue: in a function given to cqueue:wrap, while cqueue:loop or :step runs",
  elsewhere = "this call waits, and in another cqueue than the one that its connection was opened in: "
    .. "use a connection of this cqueue's own",
  home = function() return (running()) end,
}

function host.start(fn, ...)
  local cq = running()
  if not cq then error("spawn: with the runtime 'cqueues' " .. host.outside, 3) end
  cq:wrap(fn, ...)
end

-- An object that cqueues.poll takes: for each side of a descriptor, made once.
local function pollable(watch, events)
  local object = watch[events]
  if not object then
    object = { pollfd = watch.fd, events = events }
    watch[events] = object
  end
  return object
end

function host.pause(task, seconds, watch, events)
  local alarm = task.alarm
  if not alarm then
    alarm = new_condition()
    task.alarm = alarm
  end
  if not watch then
    poll(alarm, seconds)
    return false
  end
  -- A hang-up may end the poll without naming an object: that is found out by reading.
  local first = poll(pollable(watch, events), alarm, seconds)
  return first ~= alarm and (seconds == nil or first ~= seconds)
end

function host.wake(task)
  if task.alarm then task.alarm:signal() end
end

-- A cqueue remembers the state of descriptors.
host.forget = cqueues.cancel

---@class moonrabbit.runtime.cqueues
local M = hosted.runtime(host)

return M
