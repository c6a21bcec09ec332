-- Installed as docs/openresty.md says: by LuaRocks for LuaJIT into a tree of its own, which nginx is told of by
-- lua_package_path and lua_package_cpath, and by nothing else.
local broker = require "support.broker"
local nginx = require "support.nginx"
local ok = broker.ok

if _VERSION ~= "Lua 5.4" then return end -- it takes a while, and nothing of it hangs on the Lua that runs this

local function documented(tree)
  local file = assert(io.open "docs/openresty.md")
  local text = file:read "*a"
  file:close()
  local lines = {}
  for directive in text:gmatch "\n(lua_package_c?path '/opt/rocks[^\n]*;)[^\n]*" do lines[#lines + 1] = directive end
  assert(#lines == 2, "docs/openresty.md lacks lua_package_path or lua_package_cpath")
  return (table.concat(lines, "\n"):gsub("/opt/rocks", tree))
end

describe("moonrabbit of LuaRocks in nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end
  if nginx.shell "command -v luarocks" == "" then pending "LuaRocks is not installed" return end

  it("publishes", function()
    local output = nginx.shell "scripts/rocks-test luajit 2>&1"
    assert.matches(" 0 failed$", output)
    local tree = nginx.here .. "/build/rocks/luajit/tree"
    local channel, queue = ok(broker.connect():channel()), broker.unique "installed"
    ok(channel:queue_declare(queue))
    local server = nginx.start { paths = documented(tree),
      http = ([[init_worker_by_lua_block { require "moonrabbit.resty".start %q }]]):format(broker.url),
      server = [[
        location /ping { return 200; }
        location /publish {
          content_by_lua_block {
            local ok, err = require "moonrabbit.resty".publish("hello", { routing_key = ngx.var.arg_queue })
            ngx.say(ok and "ok" or err.message, " ", package.searchpath("moonrabbit.core", package.cpath))
          }
        }
      ]],
    }
    local answer = server:ready "/ping":request("/publish?queue=" .. queue)
    local log = server:log()
    server:stop()
    local message = ok(channel:get(queue, { no_ack = true }))
    channel:queue_delete(queue)
    broker.close_all()
    assert.equal(("ok %s/lib/lua/5.1/moonrabbit/core.so\n"):format(tree), answer, log)
    assert.equal("hello", message.body)
  end)
end)
