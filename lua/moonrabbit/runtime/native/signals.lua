--- Signals of the process: each one runs its function in a task.

local net = require "moonrabbit.net"
local loop = require "moonrabbit.runtime.native.loop"

local handlers = {}

function loop.on_signals()
  local name = net.next_signal()
  while name do
    if handlers[name] then loop.spawn(handlers[name], name) end
    name = net.next_signal()
  end
end

local M = {}

--- Watches a signal, or stops watching it.
---@param name string "INT", "TERM", "HUP", "USR1" ...
---@param fn fun(name: string)? nil: what was there before is restored
---@param exit_on_second boolean? the second such signal ends the process at once, with 128 + number
---@return boolean|nil ok, string? text
function M.signal(name, fn, exit_on_second)
  name = name:gsub("^SIG", "")
  local ok, text = net.signal(name, fn ~= nil, exit_on_second)
  if not ok then return nil, text end
  if fn and not handlers[name] then loop.watched = loop.watched + 1 end
  if not fn and handlers[name] then loop.watched = loop.watched - 1 end
  handlers[name] = fn
  return true
end

return M
