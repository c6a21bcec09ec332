--- The runtime for cqueues: tasks are coroutines of a cqueue, beside the user's own.
--
-- A connection belongs to the cqueue that it was opened in: what waits for it is woken there, and a
-- call from another one throws. `spawn` starts tasks in the cqueue that runs. Names are looked up by
-- the system (getaddrinfo, in threads of ours) and not by cqueues.dns, which knows little of
-- nsswitch.conf, and so not of what containers, mDNS and directories call a host; `dns = true` in the
-- runtime's table has cqueues.dns asked instead.

local hosted = require "moonrabbit.runtime.shared.hosted"
local cqueues = hosted.library "cqueues"
local new_condition = require("cqueues.condition").new
local names = require "moonrabbit.runtime.shared.names"

local poll, running = cqueues.poll, cqueues.running

local host = {
  name = "cqueues",
  outside = "it must be made in a cqueue: in a function given to cqueue:wrap, while cqueue:loop or :step runs",
  elsewhere = "this call waits, and in another cqueue than the one that its connection was opened in: "
    .. "use a connection of this cqueue's own",
  home = function() return (running()) end,
}

function host.start(fn)
  local cq = running()
  if not cq then error("spawn: with the runtime 'cqueues' " .. host.outside, 3) end
  cq:wrap(fn)
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
---@field dns boolean? names are looked up by cqueues.dns, and the pool that cqueues.dns.setpool was given; false by default
local M

function host.look_up(loop, by_system)
  local by_cqueues
  return function(...)
    if not M.dns then return by_system(...) end
    by_cqueues = by_cqueues or names.of(loop, require "moonrabbit.runtime.cqueues.names")
    return by_cqueues(...)
  end
end

M = hosted.runtime(host)

--- A condition of cqueues that is signalled whenever one of ours is: what cqueues.poll is given for our objects
--- (moonrabbit.pollable). The other's `signal` and `broadcast` answer then how many coroutines that woke.
function M.bell(condition)
  local bell, class = condition.bell, getmetatable(condition)
  if bell then return bell end
  bell = new_condition()
  condition.bell = bell

  function condition:signal()
    class.signal(self)
    return bell:signal()
  end

  function condition:broadcast()
    class.broadcast(self)
    return bell:signal()
  end

  return bell
end

return M
