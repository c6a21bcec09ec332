--- The default runtime: coroutines over epoll (poll elsewhere), timers, no dependency. The contract
--- of every function is in docs/internals.md.
--
-- There is one loop in a Lua state. In a task a waiting call yields. In a script's main chunk, or in
-- a coroutine of the user's own while no loop runs, the same call runs the loop until it is done. In
-- a coroutine of the user's own inside a running loop it throws, and names moonrabbit.spawn.

local net = require "moonrabbit.net"
local loop = require "moonrabbit.runtime.native.loop"
local descriptors = require "moonrabbit.runtime.native.descriptors"
local condition = require "moonrabbit.runtime.shared.condition"
local open = require "moonrabbit.runtime.shared.open"
local server = require "moonrabbit.runtime.shared.server"
local transport = require "moonrabbit.runtime.shared.transport"
local signals = require "moonrabbit.runtime.native.signals"

local new_transport = transport.of(descriptors, loop.alone)

---@class moonrabbit.runtime.native
---@field on_error fun(text: string, task: table) an error that left a task, with its traceback
---@field long_turn number? seconds; a task that does not yield for longer is reported; nil: off
---@field on_long_turn fun(seconds: number, source: string)?
local M = {
  name = "native",
  now = net.now,
  sleep = loop.sleep,
  spawn = loop.spawn,
  current = loop.current,
  cancel = loop.cancel,
  cancelled = loop.cancelled,
  condition = condition.of(loop),
  open = open.of(descriptors, new_transport, loop.cancelled),
  listen = server.of(descriptors, new_transport),
  transport = new_transport,
  signal = signals.signal,
  run = loop.run,
  turn_source = loop.turn_source,
  long_turn = nil,
  on_long_turn = nil,
}

function M.on_error(text)
  io.stderr:write("moonrabbit: error in a task: ", text, "\n")
end

loop.settings = M

return M
