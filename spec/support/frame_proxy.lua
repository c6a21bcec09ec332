-- A proxy that sees AMQP frames: from the first delivery, or get, on it counts them in each
-- direction, and at the n-th calls a function instead of passing it on.
local native = require "moonrabbit.runtime.native"

local frame_proxy = {}

local Proxy = {}
Proxy.__index = Proxy

local function u32(s, at)
  local a, b, c, d = s:byte(at, at + 3)
  return ((a * 256 + b) * 256 + c) * 256 + d
end

local function u16(s, at)
  local a, b = s:byte(at, at + 1)
  return a * 256 + b
end

-- The next whole frame of a buffer and what is left; the protocol header counts as one.
local function next_frame(buffer)
  if buffer:sub(1, 4) == "AMQP" then return buffer:sub(1, 8), buffer:sub(9) end
  if #buffer < 7 then return nil, buffer end
  local size = u32(buffer, 4) + 8
  if #buffer < size then return nil, buffer end
  return buffer:sub(1, size), buffer:sub(size + 1)
end

-- "60.40" for a method, "header", "body", "heartbeat".
local kinds = { [2] = "header", [3] = "body", [8] = "heartbeat" }
local function kind_of(frame)
  local kind = frame:byte(1)
  if kind == 1 then return u16(frame, 8) .. "." .. u16(frame, 10) end
  return kinds[kind] or "greeting"
end

-- Whether the frame is the one to stop at.
local function counted(self, direction, frame)
  local kind = kind_of(frame)
  if kind == "60.60" or kind == "60.70" then self.counting = true end
  if not self.counting or kind == "heartbeat" then return false end
  self.counts[direction] = self.counts[direction] + 1
  self.seen[#self.seen + 1] = direction .. " " .. kind
  return direction == self.direction and self.counts[direction] == self.n and not self.done
end

local function copy(self, direction, from, to)
  local buffer = ""
  while true do
    local bytes = from:read(65536)
    if not bytes then break end
    local frame
    frame, buffer = next_frame(buffer .. bytes)
    while frame do
      if counted(self, direction, frame) then
        self.done = true
        self.act()
        from:close()
        to:close()
        return
      end
      if not to:write(frame) then break end
      frame, buffer = next_frame(buffer)
    end
  end
  from:close()
  to:close()
end

--- Starts one. direction "up" (to the broker) or "down", n: which frame; act(): what happens then, beside the
--- connection's end. proxy.counts tells how many came, proxy.seen which.
function frame_proxy.start(host, port, direction, n, act)
  local server = assert(native.listen("127.0.0.1", 0))
  local self = setmetatable({ server = server, port = server:port(), direction = direction, n = n, act = act,
    counts = { up = 0, down = 0 }, seen = {} }, Proxy)
  native.spawn(function()
    while true do
      local client = server:accept()
      if not client then break end
      local upstream = native.open({ host = host, port = port }, nil, 5)
      if upstream then
        native.spawn(copy, self, "up", client, upstream)
        native.spawn(copy, self, "down", upstream, client)
      else
        client:close()
      end
    end
  end)
  return self
end

function Proxy:stop()
  self.server:close()
end

return frame_proxy
