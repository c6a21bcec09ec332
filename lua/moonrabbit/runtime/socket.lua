--- What programs written for LuaSocket take for a socket, over a runtime's own transport: its waits are the
-- runtime's, so nothing blocks the loop.
--
-- It knows `connect`, `send`, `receive` (a line or a number of bytes), `settimeout` (which does nothing: the deadline
-- is the socket's) and `close`. LuaSocket passes on what went wrong as a word; the whole is kept in `failure`.
-- @module moonrabbit.runtime.socket

local MAX_LINE = 65536
local CHUNK = 65536

---@class moonrabbit.runtime.Socket
---@field failure { kind: string, message: string, temporary: boolean }?
---@field deadline number  in the runtime's time
---@field ended boolean?   the peer has closed
local Socket = {}
Socket.__index = Socket

-- Keeps what went wrong, which LuaSocket passes on as a word only.
local function fail(self, kind, text, temporary)
  if kind == "timeout" then text, temporary = ("no answer within %g s"):format(self.timeout), true end
  self.failure = self.failure or { kind = kind, message = text, temporary = temporary }
  return nil, kind
end

local function left(self)
  return self.deadline - self.runtime.now()
end

function Socket.settimeout() return 1 end
function Socket.getfd() return -1 end

function Socket:dirty() return self.at <= #self.buffer end

function Socket:connect(host, port)
  local transport, kind, text, temporary = self.runtime.open({ host = host, port = port }, self.tls, self.timeout)
  if not transport then return fail(self, kind, text or kind, temporary) end
  self.transport = transport
  return 1
end

function Socket:send(bytes)
  local time = left(self)
  if time <= 0 then return fail(self, "timeout") end
  local ok, kind, text = self.transport:write(bytes, time)
  if not ok then return fail(self, kind, text, true) end
  return #bytes
end

-- More bytes into the buffer. nil, kind at the end and after the deadline.
local function fill(self)
  local time = left(self)
  if time <= 0 then return fail(self, "timeout") end
  local bytes, kind, text = self.transport:read(CHUNK, time)
  if not bytes then
    self.ended = true
    if kind == "closed" then return nil, "closed" end
    return fail(self, kind, text, true)
  end
  self.taken = self.taken + #bytes
  if self.taken > self.max then
    return fail(self, "overflow", ("the answer is larger than %d bytes (max_body)"):format(self.max_body), false)
  end
  self.buffer = self.buffer:sub(self.at) .. bytes
  self.at = 1
  return true
end

local function receive_line(self)
  while true do
    local stop = self.buffer:find("\n", self.at, true)
    if stop then
      local line = self.buffer:sub(self.at, stop - 1)
      self.at = stop + 1
      return (line:gsub("\r", ""))
    end
    if #self.buffer - self.at >= MAX_LINE then
      return fail(self, "protocol", "the server's answer is no HTTP: a line without an end", false)
    end
    local more, kind = fill(self)
    if not more then
      local rest = self.buffer:sub(self.at)
      self.buffer, self.at = "", 1
      return nil, kind, rest
    end
  end
end

local function receive_count(self, count)
  local parts = { self.buffer:sub(self.at, self.at + count - 1) }
  local have = #parts[1]
  self.at = self.at + have
  while have < count do
    local more, kind = fill(self)
    if not more then return nil, kind, table.concat(parts) end
    local part = self.buffer:sub(self.at, self.at + count - have - 1)
    self.at = self.at + #part
    have = have + #part
    parts[#parts + 1] = part
  end
  return table.concat(parts)
end

--- As LuaSocket's: a line, or so many bytes; at the end nil, "closed" and what there was.
function Socket:receive(pattern, prefix)
  local text, kind, rest
  if type(pattern) == "number" then
    text, kind, rest = receive_count(self, pattern)
  else
    text, kind, rest = receive_line(self)
  end
  prefix = prefix or ""
  if text then return prefix .. text end
  return nil, kind, prefix .. (rest or "")
end

function Socket:close()
  if self.transport then self.transport:close() end
  return 1
end

local M = {}

--- Makes one; `connect` opens it.
---@param fields { runtime: table, timeout: number, tls: table?, max: integer?, max_body: integer? }  the deadline is `timeout` from now
---@return moonrabbit.runtime.Socket
function M.new(fields)
  return setmetatable({
    runtime = fields.runtime, tls = fields.tls, timeout = fields.timeout,
    deadline = fields.runtime.now() + fields.timeout, max = fields.max or math.huge, max_body = fields.max_body,
    buffer = "", at = 1, taken = 0,
  }, Socket)
end

return M
