--- One HTTP request at a time, over a runtime's own transport: LuaSocket's HTTP client, which reads and
-- writes through an object of ours instead of a socket of its own, so that nothing blocks the loop.
--
-- `socket.http.request` runs inside LuaSocket's `protect`, a pcall of C that nothing can yield through on
-- Lua 5.1 and LuaJIT. The functions that it is made of (`http.open` and its methods) are public too, and
-- are used here within moonrabbit.protect. They follow no redirects, which is just as well: a password
-- goes to the address that was named, and nowhere else.
-- @module moonrabbit.management.http

local errors = require "moonrabbit.errors"
local protect = require "moonrabbit.protect"

local http = {}

-- Header lines and the framing of chunks, beyond the body.
local MAX_OVERHEAD = 256 * 1024
local MAX_LINE = 65536
local CHUNK = 65536

local function library()
  local ok, found = pcall(require, "socket.http")
  if not ok then
    error("the management API needs LuaSocket (Debian: lua-socket; else: luarocks install luasocket): "
      .. tostring(found):match "^[^\n]*", 0)
  end
  return found, require "ltn12"
end

-- ---- What LuaSocket takes for a socket --------------------------------------------------------------

---@class moonrabbit.management.Socket
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

-- ---- A request --------------------------------------------------------------------------------------

---@class moonrabbit.management.Request
---@field runtime table
---@field host string
---@field port integer
---@field tls table?
---@field method string
---@field target string          path and query, encoded
---@field headers table<string, string>  names in small letters
---@field body string?
---@field timeout number         seconds, for all of it
---@field max_body integer       bytes of an answer
---@field label string           "host:port", for errors

local function exchange(client, ltn12, request, socket, parts)
  local h = client.open(request.host, request.port, function() return socket end)
  h:sendrequestline(request.method, request.target)
  h:sendheaders(request.headers)
  if request.body then h:sendbody(request.headers, ltn12.source.string(request.body)) end
  local code, status = h:receivestatusline()
  if not code then return nil, status end
  local headers = h:receiveheaders()
  while code == 100 do
    code, status = h:receivestatusline()
    if not code then return nil, status end
    headers = h:receiveheaders()
  end
  if request.method ~= "HEAD" and code ~= 204 and code ~= 304 then
    h:receivebody(headers, (ltn12.sink.table(parts))) -- it returns two
  end
  return code, headers
end

local function problem(request, socket, thrown)
  local failure = socket.failure
  if failure then
    failure.endpoint = request.label
    return errors.new(failure)
  end
  if thrown == "closed" then
    return errors.new { kind = "closed", endpoint = request.label,
      message = "the server closed the connection before it had answered", temporary = true }
  end
  return errors.new { kind = "protocol", endpoint = request.label,
    message = "the server's answer is no HTTP (is it the port of the management API?)" }
end

--- Sends a request and reads the whole answer.
---@param request moonrabbit.management.Request
---@return integer|nil code, table|moonrabbit.Error headers, string? body
function http.request(request)
  local runtime = request.runtime
  local socket = setmetatable({
    runtime = runtime, tls = request.tls, timeout = request.timeout, deadline = runtime.now() + request.timeout,
    max_body = request.max_body, max = request.max_body + MAX_OVERHEAD,
    buffer = "", at = 1, taken = 0,
  }, Socket)
  local parts = {}
  local client, ltn12 = library()
  local ok, code, headers = protect(exchange, client, ltn12, request, socket, parts)
  socket:close()
  if ok and code then return code, headers, table.concat(parts) end
  if ok then return nil, problem(request, socket) end
  if code ~= runtime.cancelled then
    -- LuaSocket throws what the world did as a table that holds a word. Some answers that end too early make
    -- it stumble. Everything else is not ours to catch.
    if type(code) == "table" and code[1] ~= nil then return nil, problem(request, socket, code[1]) end
    if type(code) == "string" and socket.ended then return nil, problem(request, socket) end
  end
  error(code, 0)
end

return http
