--- Tells systemd how the service is: sd_notify(3). Without NOTIFY_SOCKET nothing happens.
-- @module moonrabbit.life.notify

local net = require "moonrabbit.net"

local notify = {}

local silent = false

--- Nothing is told from now on: a worker's parent speaks for all.
function notify.leave_to_parent() silent = true end

--- Sends a state.
---@param ... string "READY=1", "STATUS=…"
function notify.send(...)
  local path = os.getenv "NOTIFY_SOCKET"
  if silent or not path or path == "" then return end
  net.datagram(path, table.concat({ ... }, "\n")) -- nobody who listens is no reason to stop working
end

--- It is reading its configuration again; "READY=1" ends it.
function notify.reloading()
  notify.send("RELOADING=1", ("MONOTONIC_USEC=%.0f"):format(net.now() * 1e6))
end

--- How often systemd wants to hear that the service is alive, in seconds: half of WATCHDOG_USEC; nil: not at all.
---@return number?
function notify.watchdog()
  local usec, pid = tonumber(os.getenv "WATCHDOG_USEC" or ""), tonumber(os.getenv "WATCHDOG_PID" or "")
  if silent or not usec or usec <= 0 or pid and pid ~= net.pid() then return nil end
  return usec / 2e6
end

return notify
