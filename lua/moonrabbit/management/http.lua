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
local Socket = require "moonrabbit.runtime.socket"

local http = {}

-- Header lines and the framing of chunks, beyond the body.
local MAX_OVERHEAD = 256 * 1024

local function library()
  local ok, found = pcall(require, "socket.http")
  if not ok then
    error("the management API needs LuaSocket (Debian: lua-socket; else: luarocks install luasocket): "
      .. tostring(found):match "^[^\n]*", 0)
  end
  return found, require "ltn12"
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
  local socket = Socket.new {
    runtime = runtime, tls = request.tls, timeout = request.timeout, max = request.max_body + MAX_OVERHEAD,
    max_body = request.max_body,
  }
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
