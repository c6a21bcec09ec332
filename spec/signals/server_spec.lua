-- The HTTP server of metrics, over real sockets.
local moonrabbit = require "moonrabbit"
local metrics = moonrabbit.metrics
local native = require "moonrabbit.runtime.native"

-- Sends bytes, maybe in pieces, and reads to the end.
local function ask(port, ...)
  local stream = assert(native.open({ host = "127.0.0.1", port = port }, nil, 5))
  for _, piece in ipairs { ... } do
    if type(piece) == "number" then native.sleep(piece) else stream:write(piece, 5) end
  end
  local all = {}
  repeat
    local bytes = stream:read(65536, 10)
    all[#all + 1] = bytes
  until not bytes
  stream:close()
  return table.concat(all)
end

local function get(port, path) return ask(port, "GET " .. path .. " HTTP/1.1\r\nHost: x\r\n\r\n") end

describe("the server of metrics", function()
  local server, m

  local function start(opts)
    m = metrics.new()
    local all = { metrics = m, address = "127.0.0.1:0" }
    for key, value in pairs(opts or {}) do all[key] = value end
    server = assert(metrics.serve(all))
    return server:port()
  end
  after_each(function()
    if server then server:close() end
    server = nil
  end)

  it("serves the page, its head, and says how long it is", function()
    local port = start()
    m:observer().delivered("q", {})
    local answer = get(port, "/metrics?x=1")
    local head, body = answer:match "^(.-)\r\n\r\n(.*)$"
    assert.truthy(head:find("HTTP/1.1 200 OK", 1, true))
    assert.truthy(head:find("text/plain; version=0.0.4", 1, true))
    assert.equal(#body, tonumber(head:match "Content%-Length: (%d+)"))
    assert.truthy(body:find('moonrabbit_messages_delivered_total{queue="q"} 1', 1, true))
    local only = ask(port, "HEAD /metrics HTTP/1.0\r\n\r\n")
    assert.equal("", only:match "\r\n\r\n(.*)$")
    assert.equal(#body, tonumber(only:match "Content%-Length: (%d+)"))
  end)

  it("takes a request that comes in pieces", function()
    assert.truthy(ask(start(), "GET /met", 0.02, "rics HTTP/1.1\r\nHost:", 0.02, " x\r\n\r\n"):find "^HTTP/1.1 200")
  end)

  it("refuses what it does not have, do or understand", function()
    local port = start()
    assert.truthy(get(port, "/etc/passwd"):find "^HTTP/1.1 404")
    local answer = ask(port, "POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc")
    assert.truthy(answer:find "^HTTP/1.1 405")
    assert.truthy(answer:find("Allow: GET, HEAD", 1, true))
    assert.truthy(ask(port, "nonsense\r\n\r\n"):find "^HTTP/1.1 400")
    assert.truthy(ask(port, "GET /" .. ("x"):rep(9000) .. " HTTP/1.1\r\n\r\n"):find "^HTTP/1.1 431")
  end)

  it("says what is missing", function()
    local port = start()
    assert.truthy(get(port, "/readyz"):find '{"ready":true}\n$')
    local off = m:ready("broker", function() return nil, "recovering" end)
    m:healthy("loop", function() error "boom" end)
    local answer = get(port, "/readyz")
    assert.truthy(answer:find "^HTTP/1.1 503")
    assert.truthy(answer:find('{"missing":[{"name":"broker","reason":"recovering"}],"ready":false}', 1, true))
    assert.truthy(get(port, "/healthz"):find("the check threw", 1, true))
    off()
    assert.truthy(get(port, "/readyz"):find "^HTTP/1.1 200")
  end)

  it("is not held up by slow clients, and lets go of them", function()
    local port = start { timeout = 2, max_clients = 3 }
    local slow = {}
    for i = 1, 2 do
      slow[i] = assert(native.open({ host = "127.0.0.1", port = port }, nil, 5))
      slow[i]:write("GET /", 5)
    end
    assert.truthy(get(port, "/healthz"):find "^HTTP/1.1 200")
    assert.equal("timeout", select(2, slow[1]:read(4096, 0))) -- it is still waited for
    assert.truthy(slow[1]:read(4096, 10):find "^HTTP/1.1 408")
    for i = 1, 2 do slow[i]:close() end
  end)

  it("turns away more than it may have at once", function()
    local port = start { timeout = 5, max_clients = 1 }
    local one = assert(native.open({ host = "127.0.0.1", port = port }, nil, 5))
    one:write("GET /", 5)
    native.sleep(0.05)
    assert.equal("", get(port, "/healthz"))
    one:write("healthz HTTP/1.1\r\n\r\n", 5)
    assert.truthy(one:read(4096, 5):find "^HTTP/1.1 200")
    one:close()
  end)

  it("goes on when a page cannot be made", function()
    local said
    local port = start { text = function() error "secret detail" end, log = function(_, text) said = text end }
    local answer = get(port, "/metrics")
    assert.truthy(answer:find "^HTTP/1.1 500")
    assert.falsy(answer:find("secret detail", 1, true))
    assert.truthy(said:find("secret detail", 1, true))
  end)

  it("says that an address is taken, and throws for what is none", function()
    local port = start()
    local second, err = metrics.serve { metrics = m, address = "127.0.0.1:" .. port }
    assert.is_nil(second)
    assert.equal("refused", err.kind)
    assert.has_error(function() metrics.serve { metrics = m, address = "9419" } end)
    assert.has_error(function() metrics.serve { metrics = m, address = "127.0.0.1:99999" } end)
    assert.has_error(function() metrics.serve {} end)
  end)
end)
