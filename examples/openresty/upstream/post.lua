--- One POST over a cosocket. It asks for HTTP/1.0, so that an answer ends with its connection and comes in one piece.
--
-- That is all that this example needs. For https, connections that are kept, or answers without bounds there is
-- lua-resty-http (`opm get ledgetech/lua-resty-http`, `luarocks install lua-resty-http`), whose `request_uri` takes
-- the place of this function.

-- More of an answer is not read.
local MOST = 64 * 1024

local function parse(url)
  local host, port, path = url:match "^http://([^/:]+):?(%d*)(.*)$"
  if not host then error("post: no http:// URL: " .. url, 3) end
  return host, tonumber(port) or 80, path ~= "" and path or "/"
end

local function head_of(host, path, body, headers)
  local lines = { ("POST %s HTTP/1.0"):format(path), "Host: " .. host, "Content-Length: " .. #body }
  for name, value in pairs(headers) do
    -- What comes from a message must not begin a header of its own.
    lines[#lines + 1] = name .. ": " .. tostring(value):gsub("%c", " ")
  end
  return table.concat(lines, "\r\n") .. "\r\n\r\n"
end

-- Everything until the connection ends, or enough of it.
local function read_all(socket)
  local parts, size = {}, 0
  while size < MOST do
    local bytes, err = socket:receiveany(MOST)
    if not bytes then
      if err == "closed" then break end
      return nil, err
    end
    parts[#parts + 1], size = bytes, size + #bytes
  end
  return table.concat(parts)
end

local function exchange(socket, request)
  local ok, err = socket:send(request)
  if not ok then return nil, err end
  return read_all(socket)
end

local function understand(text)
  local head, body = text:match "^(.-\r\n)\r\n(.*)$"
  local status = head and head:match "^HTTP/1%.%d (%d%d%d)"
  if not status then return nil, "the upstream's answer is no HTTP" end
  local headers = {}
  for name, value in head:gmatch "\r\n([^:\r\n]+):[ \t]*([^\r\n]*)" do headers[name:lower()] = value end
  return { status = tonumber(status), headers = headers, body = body }
end

---@param url string http://host:port/path
---@param body string
---@param headers table<string, string>
---@param timeout number seconds for each step: connecting, sending, and every read
---@return { status: integer, headers: table<string, string>, body: string }|nil answer, string? err
return function(url, body, headers, timeout)
  local host, port, path = parse(url)
  local socket = ngx.socket.tcp()
  socket:settimeout(timeout * 1000)
  local ok, err = socket:connect(host, port)
  local text
  if ok then
    text, err = exchange(socket, head_of(host, path, body, headers) .. body)
    socket:close()
  end
  if not text then return nil, ("the upstream %s:%d: %s"):format(host, port, tostring(err)) end
  return understand(text)
end
