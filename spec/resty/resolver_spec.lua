-- Host names in nginx: looked up by its own resolver.
local broker = require "support.broker"
local nginx = require "support.nginx"
local process = require "support.process"

-- A name server over UDP, which nginx asks first: "broker.test" is 127.0.0.1, nothing else has an
-- address.
local name_server = [[
  local socket = require "socket".udp()
  assert(socket:setsockname("127.0.0.1", 0))
  print(select(2, socket:getsockname()))
  io.flush()
  local known = { ["broker.test"] = { "\127\0\0\1" } }
  local function u16(n) return string.char(math.floor(n / 256), n % 256) end
  while true do
    local bytes, host, port = socket:receivefrom()
    local labels, at = {}, 13
    while bytes:byte(at) ~= 0 do
      labels[#labels + 1] = bytes:sub(at + 1, at + bytes:byte(at))
      at = at + bytes:byte(at) + 1
    end
    local addresses = known[table.concat(labels, ".")]
    local answers = {}
    for i, address in ipairs(addresses or {}) do
      answers[i] = "\192\12" .. u16(1) .. u16(1) .. "\0\0\0\1" .. u16(4) .. address
    end
    socket:sendto(bytes:sub(1, 2) .. "\129" .. string.char(addresses and 128 or 131) .. u16(1) .. u16(#answers)
      .. "\0\0\0\0" .. bytes:sub(13, at + 4) .. table.concat(answers), host, port)
  end
]]

describe("host names in nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end
  if not pcall(require, "socket") then pending "LuaSocket is not installed" return end

  local names, path, server

  setup(function()
    path = process.file(name_server)
    names = process.start { path }
    local port = broker.eventually(function() return tonumber((names:out():match "^(%d+)%s")) end, 10, "it listens")
    server = nginx.start {
      http = ("resolver 127.0.0.1:%d ipv6=off;\nresolver_timeout 2s;"):format(port),
      server = ([[
        location /ping { return 200; }
        location /connect {
          content_by_lua_block {
            local rabbit = require "moonrabbit.resty"
            local conn, err = rabbit.connect { uri = (%q):gsub("HOST", ngx.var.arg_host), connect_timeout = 5 }
            if not conn then return ngx.say(err.kind, " ", tostring(err.temporary), " ", err.message) end
            ngx.say(conn.endpoint)
            conn:close(5)
          }
        }
      ]]):format((broker.uri { host = "HOST" })),
    }
    server:ready "/ping"
  end)

  teardown(function()
    server:stop()
    names:stop()
    os.remove(path)
  end)

  local function connect(host) return (server:request("/connect?host=" .. host)) or server:log() end

  it("are looked up by its resolver", function()
    assert.equal(("broker.test:%d\n"):format(broker.parsed().port), connect "broker.test")
  end)

  it("that are none are errors of kind dns, and may be there later", function()
    assert.matches("^dns true cannot connect to nowhere.test:%d+: .*resolve", connect "nowhere.test")
  end)
end)
