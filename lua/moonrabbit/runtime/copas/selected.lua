--- Objects that Copas selects: what looks like a socket, for a descriptor of ours. Copas asks them for `getfd`, and for
--- `dirty`, which says that it can be read whatever its descriptor says: so a wait is ended at once, and without a pipe.
-- @module moonrabbit.runtime.copas.selected

local copas = require "copas"
local socket = require "socket"
local now = require("moonrabbit.net").now

local receive, send = copas.receivepartial or copas.receivePartial, copas.send
local writable = (socket.udp4 or socket.udp)() -- can always be written to

local M = {
  arm = nil, -- function(deadline): ends the next select then; only waits with a deadline need it
}

local function due(side)
  if not side.waiting then return false end
  if side.woken then return true end
  local deadline = side.deadline
  if not deadline then return false end
  if now() >= deadline then return true end
  M.arm(deadline)
  return false
end

--- A descriptor and who waits for it: one task to read, one to write.
local Object = {}
Object.__index = Object

function M.new(fd)
  return setmetatable({ fd = fd, r = { waiting = false }, w = { waiting = false } }, Object)
end

-- Both are asked before each select. `dirty` speaks for reading only.
function Object:getfd() return due(self.w) and writable:getfd() or self.fd end

function Object:dirty() return due(self.r) end

-- Copas tries first, then waits until the object is ready, and tries again.
local function try(side)
  if side.asked then return true end
  side.asked = true
  return nil, "timeout"
end

function Object:receive() return try(self.r) end

function Object:send()
  local done, err = try(self.w)
  return done, err, 0
end

function Object:settimeout() end -- luacheck: ignore 212
function Object:close() end      -- luacheck: ignore 212

--- Waits for one side of an object. False: it was woken, or the deadline has come.
function M.wait(object, events, deadline)
  local side = object[events]
  side.deadline, side.asked, side.woken, side.waiting = deadline, false, false, true
  if events == "w" then send(object, "") else receive(object, 1) end
  side.waiting = false
  return not side.woken and not (deadline and now() >= deadline)
end

return M
