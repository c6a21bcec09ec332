-- TLS in nginx: its own trusted certificates, and client certificates.
local broker = require "support.broker"
local nginx = require "support.nginx"

describe("tls in nginx #resty", function()
  if not broker.tls_url then pending "AMQPS_URL is not set: no broker with TLS" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local dir = broker.tls_dir
  local server

  setup(function()
    local connect = [[
      content_by_lua_block {
        local rabbit = require "moonrabbit.resty"
        local dir = os.getenv "TLS_DIR"
        local tls = { verify = ngx.var.arg_verify ~= "no", server_name = ngx.var.arg_name }
        if ngx.var.arg_cert then tls.cert, tls.key = dir .. "/" .. ngx.var.arg_cert, dir .. "/client.key" end
        local conn, err = rabbit.connect { uri = os.getenv "AMQPS_URL", connect_timeout = 5, tls = tls,
          mechanism = ngx.var.arg_external and "EXTERNAL" or nil }
        if not conn then
          ngx.say(err.kind, " ", tostring(err.temporary), " ", tostring(err))
          return
        end
        local ch = assert(conn:channel { confirm = true })
        local queue = assert(ch:queue_declare("", { exclusive = true })).queue
        local body = ("secret "):rep(100000)
        assert(ch:publish(body, { routing_key = queue }))
        assert(assert(ch:get(queue)).body == body)
        assert(conn:close(5))
        ngx.say "ok"
      }
    ]]
    server = nginx.start {
      main = "env AMQPS_URL;\nenv TLS_DIR;",
      env = { AMQPS_URL = broker.tls_url, TLS_DIR = dir },
      server = "location /ping { return 200; }\n"
        .. ("location /trusted { lua_ssl_trusted_certificate %s/ca.pem; %s }\n"):format(dir, connect)
        .. ("location /untrusted { lua_ssl_trusted_certificate %s/other-ca.pem; %s }\n"):format(dir, connect)
        .. ("location /none { %s }\n"):format(connect),
    }
    server:ready "/ping"
  end)

  teardown(function() server:stop() end)

  local function get(path) return (server:request(path)) or server:log() end

  it("trusts what lua_ssl_trusted_certificate names, and nothing else", function()
    assert.equal("ok\n", get "/trusted")
    assert.matches("^tls false .*certificate.*lua_ssl_trusted_certificate", get "/untrusted")
    assert.matches("^tls false .*certificate.*lua_ssl_trusted_certificate", get "/none")
    assert.equal("ok\n", get "/none?verify=no")
  end)

  it("refuses a certificate for another name", function()
    assert.matches("^tls false ", get "/trusted?name=elsewhere.example")
  end)

  -- Some handshakes are over before nginx has to wait: ngx_lua forgets what it has found then.
  it("says every time why it refuses", function()
    for _ = 1, 100 do
      assert.matches("^tls false .*certificate host mismatch", get "/trusted?name=elsewhere.example")
      assert.matches("^tls false .*certificate.*lua_ssl_trusted_certificate", get "/untrusted")
    end
  end)

  it("logs in by client certificate", function()
    assert.equal("ok\n", get "/trusted?cert=client.pem&external=1")
    assert.matches("^auth false ", get "/trusted?external=1")
    assert.matches("^tls false .*tls.cert: [^\n]*nowhere.pem", get "/trusted?cert=nowhere.pem")
  end)
end)
