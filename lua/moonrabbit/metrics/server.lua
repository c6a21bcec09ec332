--- A small HTTP server for `/metrics`, `/healthz` and `/readyz`.
--
-- It listens on loopback unless told otherwise, answers GET and HEAD, and closes each connection after its answer.
-- A request may have 8 KiB and all of it must be there within `timeout`; the answer must be taken within it too. More
-- than `max_clients` at once are turned away. So a client that is slow, or many that are, cost nothing but that.
-- @module moonrabbit.metrics.server

local json = require "moonrabbit.cli.json"
local options = require "moonrabbit.options"
local protect = require "moonrabbit.protect"

local server = {}

local MAX_REQUEST = 8192
local TEXT = "text/plain; version=0.0.4; charset=utf-8"
local JSON = "application/json"

local reasons = {
  [200] = "OK", [400] = "Bad Request", [404] = "Not Found", [405] = "Method Not Allowed", [408] = "Request Timeout",
  [431] = "Request Header Fields Too Large", [500] = "Internal Server Error", [503] = "Service Unavailable",
}

---@class moonrabbit.metrics.Server
local Server = {}
Server.__index = Server

-- ---- Requests and answers ---------------------------------------------------------------------------

-- The head of a request: method and path, or nil and a status.
local function read_request(self, client)
  local now = self.runtime.now
  local deadline, text = now() + self.timeout, ""
  while not text:find("\r?\n\r?\n") do
    if #text > MAX_REQUEST then return nil, 431 end
    local left = deadline - now()
    local bytes, kind = nil, "timeout"
    if left > 0 then bytes, kind = client:read(4096, left) end
    if not bytes then return nil, kind == "timeout" and 408 or nil end
    text = text .. bytes
  end
  if text:find("\r?\n\r?\n") > MAX_REQUEST then return nil, 431 end
  local method, path = text:match "^(%u+) (/%S*) HTTP/1%.[01]\r?\n"
  if not method then return nil, 400 end
  return method, path:match "^[^?]*"
end

local function answer(self, client, status, kind, body, head_only, more)
  local head = ("HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n%s\r\n"):format(
    status, reasons[status], kind, #body, more or "")
  client:write(head_only and head or head .. body, self.timeout)
  if status ~= 200 and status ~= 503 then
    -- What was not read would reset the connection, and take the answer along.
    for _ = 1, 16 do
      if not client:read(4096, 0.2) then break end
    end
  end
end

local function checked(list)
  local missing = {}
  for _, each in ipairs(list) do
    local ok, good, reason = pcall(each.check)
    if not ok then good, reason = nil, "the check threw: " .. tostring(good) end
    if not good then missing[#missing + 1] = { name = each.name, reason = tostring(reason or "not ready") } end
  end
  return missing
end

local function page_of_checks(list, word)
  local missing = checked(list)
  local good = #missing == 0
  return good and 200 or 503, JSON, json.encode { [word] = good, missing = not good and missing or nil } .. "\n"
end

local pages = {
  ["/metrics"] = function(self)
    local ok, text, err = protect(self.text)
    if ok and text then return 200, TEXT, text end
    self.log("error", "the page of metrics could not be made: " .. tostring(ok and err or text))
    return 500, "text/plain", "the page could not be made: see the log\n"
  end,
  ["/healthz"] = function(self) return page_of_checks(self.health(), "healthy") end,
  ["/readyz"] = function(self) return page_of_checks(self.ready(), "ready") end,
}

local function serve(self, client)
  local method, path = read_request(self, client)
  if not method then
    if path then answer(self, client, path, "text/plain", reasons[path] .. "\n") end
    return
  end
  local page = pages[path]
  if not page then
    return answer(self, client, 404, "text/plain", "there are /metrics, /healthz and /readyz\n", method == "HEAD")
  end
  if method ~= "GET" and method ~= "HEAD" then
    return answer(self, client, 405, "text/plain", "GET or HEAD\n", false, "Allow: GET, HEAD\r\n")
  end
  local status, kind, body = page(self)
  answer(self, client, status, kind, body, method == "HEAD")
end

-- ---- Listening --------------------------------------------------------------------------------------

local function client_task(self, client)
  local ok, err = protect(serve, self, client)
  if not ok then self.log("error", "the server of metrics: " .. tostring(err)) end
  client:close()
  self.clients = self.clients - 1
end

local function accept_loop(self)
  while not self.closed do
    local client = self.socket:accept()
    if client and self.clients >= self.max_clients then
      client:close()
    elseif client then
      self.clients = self.clients + 1
      self.runtime.spawn(client_task, self, client)
    elseif not self.closed then
      self.runtime.sleep(0.1) -- no descriptors are left, say
    end
  end
end

--- The port, also where 0 was asked for.
---@return integer
function Server:port() return self.socket:port() end

--- Where it listens: a URL without a path, or the path of a unix socket.
---@return string
function Server:where()
  if self.address:sub(1, 1) == "/" then return self.address end
  return "http://" .. self.address:gsub("%d+$", ("%d"):format(self:port()))
end

--- Stops listening; answers under way go on.
function Server:close()
  if self.closed then return end
  self.closed = true
  self.socket:close()
  if self.address:sub(1, 1) == "/" then os.remove(self.address) end
end

-- A unix socket's path begins with a slash.
local function address(value)
  if type(value) == "string" then
    if value:match "^/." then return nil end
    local port = tonumber(value:match ":(%d+)$")
    if value:match "^%[[%x:.]+%]:%d+$" or value:match "^[^:%s]+:%d+$" then
      if port <= 65535 then return nil end
    end
  end
  return 'an address such as "127.0.0.1:9419", "[::1]:9419", or the path of a unix socket'
end

local function listen(runtime, where)
  if where:sub(1, 1) == "/" then return runtime.listen(where) end
  local host, port = where:match "^%[?(.-)%]?:(%d+)$"
  return runtime.listen(host, tonumber(port))
end

--- What is wrong with an address, as "an address such as …"; nil: nothing.
---@package
server.address_problem = address

server.options = {
  address = address, runtime = options.either(options.string, options.table), metrics = options.table,
  text = options.callback, ready = options.callback, health = options.callback,
  timeout = options.seconds, max_clients = options.integer(1, 10000), log = options.callback,
}

local function nothing() end
local function none() return {} end

--- See moonrabbit.metrics.serve.
---@package
function server.serve(opts, level)
  level = (level or 1) + 1
  opts = options.check("metrics.serve", opts, server.options, level)
  if not opts.text and not opts.metrics then error("metrics.serve: option 'metrics' or 'text' is missing", level) end
  local runtime = require("moonrabbit.runtime").find(opts.runtime, level)
  if not runtime.listen then
    error("metrics.serve: the runtime '" .. tostring(runtime.name) .. "' cannot listen", level)
  end
  local where = opts.address or "127.0.0.1:9419"
  local socket, text = listen(runtime, where)
  if not socket then
    return nil, require("moonrabbit.errors").new { kind = "refused", temporary = false,
      message = "metrics.serve: cannot listen on " .. where .. ": " .. tostring(text) }
  end
  local metrics = opts.metrics
  local self = setmetatable({
    socket = socket, address = where, runtime = runtime, closed = false,
    timeout = opts.timeout or 5, max_clients = opts.max_clients or 32, clients = 0,
    log = opts.log or nothing,
    text = opts.text or function() return metrics:text() end,
    ready = opts.ready or metrics and function() return metrics.checks.ready end or none,
    health = opts.health or metrics and function() return metrics.checks.health end or none,
  }, Server)
  runtime.spawn(accept_loop, self)
  return self
end

return server
